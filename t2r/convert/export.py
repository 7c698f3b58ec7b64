"""Write a student in fla's format: `t2r export MODEL DST --format fla`."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from t2r.convert import fla
from t2r.convert.card import write_export_card
from t2r.convert.inspection import read_any_config
from t2r.convert.plan import TensorPlan, group_into_shards, parse_size
from t2r.convert.run import check_destination, check_space, write_json, write_weights
from t2r.convert.source import open_checkpoint
from t2r.errors import InputError
from t2r.publish import PENDING_CONFIG, publish


def export_to_fla(
    source: str,
    destination: Path,
    *,
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
    command: Sequence[str] | None = None,
) -> None:
    """Publish a student as a GSA, GLA or ABC checkpoint of flash-linear-attention; every tensor is copied.

    Args:
        source: a student's folder.
        destination: folder to publish.
        max_shard_size, overwrite, command: as in t2r.convert.convert.

    Raises:
        InputError: a student that none of fla's models can express, or a broken checkpoint.
    """
    check_destination(source, destination, overwrite=overwrite)
    student = open_checkpoint(source)
    path = student.folder / "config.json"
    config = read_any_config(student)
    if not config.model_type.startswith("t2r_"):
        raise InputError(f"{path}: model_type {student.config.get('model_type')!r} is no student of t2r")
    written = fla.write_config(config, path)
    tensors = []
    for name, tensor in student.tensors.items():
        theirs = fla.fla_name(name, written["model_type"])
        if theirs is None:
            raise InputError(f"{tensor.file}: tensor {name} has no place in fla's {written['model_type']} model")
        tensors.append(TensorPlan(theirs, "copied", tensor.dtype, tensor.shape, tensor))
    shards = group_into_shards(tensors, parse_size(max_shard_size))
    check_space(destination, sum(t.nbytes for t in tensors), student.copied_files())
    sums: dict[str, str] = {}
    with publish(destination, overwrite=overwrite, hashes=sums) as staging:
        sums.update(write_weights(shards, staging, _Nothing()))
        for file in student.copied_files():
            shutil.copyfile(file, staging / file.name)
        note = f"Written in the format of flash-linear-attention ({written['architectures'][0]})."
        write_export_card(student, staging, note, command)
        write_json(staging / PENDING_CONFIG, written)


class _Nothing:
    """An export has no new tensors."""

    def value(self, tensor: TensorPlan) -> Tensor:
        raise AssertionError(tensor.name)
