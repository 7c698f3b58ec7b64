"""Several models measured alike, for `t2r run` and `t2r eval`. Each result is kept, so that the same command goes on
where it was stopped; a model whose result is kept is not even loaded."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from t2r_evals import EvaluationOptions, ModelResult
    from t2r_evals.schema import Role


@dataclass
class Measuring:
    """What is measured, on which text, and where the results are kept.

    Args:
        folder: keeps each model's result as JSON and, while it is measured, its finished tasks.
        documents: text for the language measurements, or None.
        dtype, device: as in `t2r.model.load`.
        teacher: folder of the model with which the others are compared token by token, or None. It stays in memory
            beside one other model.
    """

    folder: Path
    options: "EvaluationOptions"
    documents: list[str] | None
    dtype: str
    device: str = "auto"
    teacher: Path | None = None
    _loaded: dict[Path, tuple[Any, Any]] = field(default_factory=dict, repr=False)

    def result(self, name: str, role: "Role", model: Path) -> "ModelResult":
        """The stored result when it belongs to this model, these options and this text; otherwise a new one."""
        from t2r.publish import write_whole
        from t2r_evals import evaluate

        teacher = None if role == "teacher" else self.teacher
        file = self.folder / f"{name.replace(' ', '-')}.json"
        key = self._key(model, teacher)
        if (kept := _kept(file, key)) is not None:
            click.echo(f"{name}: measured before, kept", err=True)
            return kept
        click.echo(f"{name}: measuring", err=True)
        beside = None if teacher is None else self.load(teacher)[0]
        loaded, tokenizer = self.load(model)
        result = evaluate(
            loaded,
            tokenizer,
            name=name,
            role=role,
            documents=self.documents,
            options=self.options,
            teacher=beside,
            components=hybrid_components(loaded) if role == "student" else None,
            folder=file.with_suffix(""),
            **_memory(loaded),
        )
        write_whole(file, json.dumps({"key": key, "result": result.model_dump(mode="json")}))
        return result

    def load(self, model: Path) -> tuple[Any, Any]:
        """The model and its tokenizer; the one loaded before makes room, unless it is the teacher."""
        from t2r.model import load

        if model not in self._loaded:
            self._loaded = {known: loaded for known, loaded in self._loaded.items() if known == self.teacher}
            self._loaded[model] = load(model, dtype=self.dtype, device=self.device)
        return self._loaded[model]

    def _key(self, model: Path, teacher: Path | None) -> str:
        from t2r import __version__
        from t2r_evals.offline import tree_key

        digest = hashlib.sha256()
        roots = [root for root in (self.options.offline_root, self.options.tasks_root) if root]
        parts = [__version__, self.options.model_dump_json(), *map(tree_key, roots), self.dtype, self.device]
        parts += self.documents or []
        for part in [*_files(model), "beside", *(_files(teacher) if teacher else []), *parts]:
            digest.update(hashlib.sha256(part.encode()).digest())
        return digest.hexdigest()


def _kept(file: Path, key: str) -> "ModelResult | None":
    """The result in `file`, if it is there, of this key, and one that this version can read."""
    from t2r_evals import ModelResult

    try:
        stored = json.loads(file.read_text())
        return ModelResult.model_validate(stored["result"]) if stored["key"] == key else None
    except (OSError, ValueError, KeyError):
        return None


def _files(model: Path) -> list[str]:
    """A line per file of a model but its card, different when the file is: its sum where the manifest has it."""
    from t2r.publish import MANIFEST

    if (model / MANIFEST).is_file():
        entries = json.loads((model / MANIFEST).read_text())["files"]
        return [f"{name} {entry['sha256']}" for name, entry in sorted(entries.items()) if name != "README.md"]
    found = [(path, path.stat()) for path in sorted(model.iterdir()) if path.is_file()]
    return [f"{path} {status.st_size} {status.st_mtime_ns}" for path, status in found]


def hybrid_components(model: Any) -> dict[str, list[Any]] | None:
    """What of a hybrid can be switched off: the attention modules of each kind of mixer, or the paths within them.
    None for a model of one kind with one path."""
    from t2r.model import Mixer, describe

    if not _is_known(model):
        return None
    groups: dict[str, list[Any]] = {}
    for kind, layer in zip(describe(model.config)["layers"], model.model.layers, strict=True):
        mixer = layer.self_attn
        paths = mixer.components() if isinstance(mixer, Mixer) else {}
        for name, path in paths.items():
            groups.setdefault(f"the {name} of the {kind} layers", []).append(path)
        if not paths:
            groups.setdefault(f"the {kind} layers", []).append(mixer)
    return groups if len(groups) > 1 else None


def _memory(model: Any) -> dict[str, int]:
    from t2r.model import describe

    if not _is_known(model):
        return {}
    found = describe(model.config)
    return {key: found[key] for key in ("state_bytes", "kv_bytes_per_token")}


def _is_known(model: Any) -> bool:
    """Whether t2r knows the architecture; of any other model the cache is its own affair."""
    from t2r.model import HOSTS

    return model.config.model_type.removeprefix("t2r_") in HOSTS
