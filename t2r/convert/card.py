"""The model card of a student: what it is, the command that made it, its licence and its origin."""

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from t2r.convert.folding import fold_numbers
from t2r.convert.plan import Plan
from t2r.convert.source import Checkpoint, member
from t2r.hub import is_hub_id

CARD = "README.md"
_MAX_CARD_BYTES = 1 << 20
_CARRIED_KEYS = ("license", "license_name", "license_link", "language")


def write_card(plan: Plan, folder: Path, destination: Path, command: Sequence[str] | None) -> None:
    """Write README.md into `folder`; `destination` is the name under which the folder will be known."""
    record = plan.to_json()
    source = plan.checkpoint.name + (f" (commit {plan.checkpoint.revision})" if plan.checkpoint.revision else "")
    call = (
        shlex.join(command) if command else f"t2r.convert.convert({plan.checkpoint.name!r}, {str(destination)!r}, ...)"
    )
    metadata = read_front_matter(plan.checkpoint.folder)
    lines = ["---", *(f"{key}: {value}" for key, value in metadata.items())]
    lines += ["library_name: transformers", "pipeline_tag: text-generation", "tags: [t2r]"]
    if is_hub_id(plan.checkpoint.name) and not Path(plan.checkpoint.name).exists():
        lines.append(f"base_model: {plan.checkpoint.name}")
    lines += ["---", "", f"# {destination.name}", ""]
    lines += [
        f"A student of `{source}`: a {record['host']} whose attention is replaced as the table below says.",
        "It is converted, not yet finetuned.",
        "",
        "    " + call,
        "",
        "| layers | mixer |",
        "|---|---|",
        *(f"| {layers} | {mixer} |" for layers, mixer in mixer_table(list(plan.config.mixers))),
        "",
        f"Parameters: {record['parameters_before']:,} from the source, "
        f"{record['parameters_after'] - record['parameters_before']:,} new. Seed {plan.seed}.",
        "",
        "Load it with:",
        "",
        "    import t2r",
        "    from transformers import AutoModelForCausalLM",
        f"    model = AutoModelForCausalLM.from_pretrained({str(destination)!r})",
        "",
        f"Licence: {metadata.get('license', 'not stated by the source')}; the source's terms apply to its weights.",
        "`conversion.json` accounts for every tensor, `manifest.json` holds the SHA-256 sum of every file.",
    ]
    (folder / CARD).write_text("\n".join(lines) + "\n")


def write_export_card(student: Checkpoint, folder: Path, note: str, command: Sequence[str] | None) -> None:
    """The student's own card with a section on what was done to it."""
    path = member(student.folder, CARD)
    text = path.read_text(errors="replace") if path.is_file() else "---\nlibrary_name: transformers\n---\n"
    call = f"\n    {shlex.join(command)}\n" if command else ""
    (folder / CARD).write_text(f"{text}\n## Export\n\n{note}\n{call}")


def mixer_table(mixers: Sequence[dict | None]) -> list[tuple[str, str]]:
    """(layers, mixer with its options) per distinct mixer; layers as "0-3,5"."""
    layers: dict[str, list[int]] = {}
    for layer, options in enumerate(mixers):
        text = "host attention, untouched"
        if options is not None:
            rest = ", ".join(f"{k} {json.dumps(v)}" for k, v in options.items() if k != "name" and v is not None)
            text = options["name"] + (f" ({rest})" if rest else "")
        layers.setdefault(text, []).append(layer)
    return [(fold_numbers(numbers), text) for text, numbers in layers.items()]


def read_front_matter(folder: Path) -> dict[str, str]:
    """Licence and language from the source's own card: plain one-line values only, nothing is parsed as YAML."""
    path = member(folder, CARD)
    if not path.is_file() or path.stat().st_size > _MAX_CARD_BYTES:
        return {}
    match = re.match(r"---\r?\n(.*?)\r?\n---", path.read_text(errors="replace"), flags=re.DOTALL)
    found = {}
    for line in match[1].splitlines() if match else ():
        key, _, value = line.partition(":")
        if key in _CARRIED_KEYS and re.fullmatch(r"\s*[\w.,:/ \[\]-]+", value):
            found[key] = value.strip()
    return found
