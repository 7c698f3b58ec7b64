"""What a model is, from its configuration and headers alone (`t2r info`)."""

from collections import Counter
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedConfig

from t2r.convert import fla
from t2r.convert.card import mixer_table
from t2r.convert.hosts import build_config
from t2r.convert.plan import DTYPES
from t2r.convert.show import print_state
from t2r.convert.source import Checkpoint, open_checkpoint
from t2r.errors import InputError
from t2r.model import HOSTS, assign_mixers, describe, student_config
from t2r.publish import MANIFEST, verify_manifest


def inspect_model(source: str) -> dict[str, Any]:
    """Mixers, parameters, memory and weight files of a host or student, as JSON values.

    Of a Hub repository the small files and the headers are downloaded.

    Raises:
        InputError: no model there, an architecture that is not supported, or a broken checkpoint.
    """
    checkpoint = open_checkpoint(source, weights=False)
    tensors = checkpoint.tensors.values()
    published = (checkpoint.folder / MANIFEST).is_file()
    config = read_any_config(checkpoint)
    mixers = getattr(config, "mixers", None) or [None] * config.num_hidden_layers
    return {
        "model": source,
        **describe(config),
        "mixers": mixers,
        "weights": {
            "files": len({t.file for t in tensors}),
            "tensors": len(tensors),
            "bytes": sum(t.nbytes for t in tensors),
            "dtypes": dict(Counter(t.dtype for t in tensors)),
        },
        "manifest_problems": verify_manifest(checkpoint.folder, contents=False) if published else None,
    }


def read_any_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """The configuration of a host or a student, by the same allow-list as a conversion's."""
    raw = checkpoint.config
    if fla.is_fla(checkpoint):
        config, mixer = fla.read_config(checkpoint)
        return student_config(config, assign_mixers(mixer, config.num_hidden_layers))
    model_type = str(raw.get("model_type"))
    host = HOSTS.get(model_type.removeprefix("t2r_"))
    if host is None:
        path = checkpoint.folder / "config.json"
        known = f"{', '.join(HOSTS)}, their students, and fla's {', '.join(fla.MODEL_TYPES)}"
        raise InputError(f"{path}: model_type {raw.get('model_type')!r} is not supported; supported are {known}")
    config = build_config(host.student_config if model_type.startswith("t2r_") else host.config, raw, checkpoint)
    dtype = str(raw.get("dtype") or raw.get("torch_dtype"))
    config.dtype = dtype if dtype in DTYPES else None
    return config


def print_information(found: dict[str, Any], console: Console) -> None:
    """The result of `inspect_model` as tables."""
    console.print(f"{found['model']}: {found['model_type']}", markup=False, highlight=False)
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("layers")
    table.add_column("mixer", overflow="fold")
    for layers, mixer in mixer_table(found["mixers"]):
        table.add_row(layers, escape(mixer))
    console.print(table)
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("parameters")
    table.add_column("count", justify="right")
    table.add_column("share", justify="right")
    total = found["parameters"]["total"]
    for kind, count in found["parameters"].items():
        table.add_row(kind, f"{count:,}", f"{count / total:.1%}", style="bold" if kind == "total" else "")
    console.print(table)
    print_state(found, console)
    weights = found["weights"]
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in weights["dtypes"].items())
    console.print(f"weights {weights['bytes'] / 1e9:.3f} GB in {weights['files']} file(s): {dtypes}", highlight=False)
    problems = found["manifest_problems"]
    if problems is not None:
        console.print(
            f"manifest: {'; '.join(problems) or 'files present, sizes as listed'}", markup=False, highlight=False
        )
