"""A run in words: what the converter did, for the report, and the last lines on the terminal."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from t2r.model.mixers import MixerOptions
    from t2r.recipe import Recipe, RunFolder
    from t2r_evals import Conversion, Report


def describe_conversion(recipe: "Recipe", folder: "RunFolder") -> "Conversion":
    """What the converter did, from the two configurations."""
    from transformers import AutoConfig

    from t2r.model import describe, host_config
    from t2r_evals import Conversion

    config = AutoConfig.from_pretrained(folder.converted, trust_remote_code=False)
    after, before = describe(config), describe(host_config(config))
    return Conversion(
        mixer=_in_words(recipe.mixer),
        layers_converted=sum(entry is not None for entry in config.mixers),
        layers_total=len(config.mixers),
        parameters_before=before["parameters"]["total"],
        parameters_after=after["parameters"]["total"],
        parameters_new=after["parameters"]["mixer"],
    )


def _in_words(mixers: "Sequence[MixerOptions]") -> str:
    """Names, styles and sizes, and whatever is not as usual for them; slots layer by layer where they differ."""
    from t2r.model.mixers import parse_options

    alike: dict[str, list[tuple[Any, str]]] = {}
    for mixer in mixers:
        stored = mixer.stored()
        chosen: dict[str, Any] = {key: stored[key] for key in ("name", "style", "map", "slots") if key in stored}
        usual = parse_options(chosen).stored()
        told = [f"{key} {value}" for key, value in stored.items() if key in chosen or value != usual[key]]
        words = [mixer.name, *(word for word in told[1:] if not word.startswith("slots "))]
        alike.setdefault(", ".join(words), []).append((stored.get("slots"), str(mixer.layers)))
    return "; ".join(words + _slots(entries) for words, entries in alike.items())


def _slots(entries: list[tuple[Any, str]]) -> str:
    """`, slots 64, layers all`, or `, slots by layer: 48+32 (0), 64 (1-7)`, where two heads of layer 0 differ."""
    if len(entries) == 1:
        slots, layers = entries[0]
        return f", layers {layers}" if slots is None else f", slots {_plus(slots)}, layers {layers}"
    if all(slots is None for slots, _ in entries):
        return f", layers {','.join(layers for _, layers in entries)}"
    return ", slots by layer: " + ", ".join(f"{_plus(slots)} ({layers})" for slots, layers in entries)


def _plus(slots: Any) -> str:
    return "+".join(str(number) for number in slots) if isinstance(slots, list | tuple) else str(slots)


def summary(report: "Report", folder: "RunFolder", seconds: float) -> str:
    """The last words on the terminal: the losses, a sample, and where everything is."""
    lines = [""]
    teacher = next(iter(report.by_role("teacher")), None)
    for result in report.results:
        if result.language is None:
            continue
        line = f"{result.name:12} validation loss {result.language.loss:.4f}"
        if teacher and teacher.language and result is not teacher:
            line += f"  ({result.language.loss - teacher.language.loss:+.4f} against the teacher)"
        lines.append(line)
    for sample in report.samples:
        lines += ["", sample.prompt + sample.text]
    places: list[tuple[str, Path]] = [
        ("student", folder.model),
        ("report", folder.path / "report.html"),
        ("", folder.path / "report.md"),
        ("", folder.path / "report.json"),
        ("recipe", folder.recipe_file),
    ]
    lines += ["", *(f"{name:8} {path}" for name, path in places), "", f"Done in {seconds / 60:.1f} minutes."]
    return "\n".join(lines)
