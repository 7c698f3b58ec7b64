"""Carry out a plan: stream, verify, describe, publish."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2r.convert.card import write_card
from t2r.convert.plan import Plan, TensorPlan, build_index, make_plan, new_tensor_names
from t2r.convert.progress import Progress
from t2r.convert.stream import NewTensors, read_blocks, write_shard
from t2r.convert.verify import verify_shard
from t2r.errors import InputError
from t2r.hub import is_hub_id
from t2r.model.loading import INDEX
from t2r.model.mixers import MixerOptions, layer_generator
from t2r.publish import MANIFEST, PENDING_CONFIG, publish
from t2r.versions import versions

RECORD = "conversion.json"
_SPARE_BYTES = 64 << 20  # tokenizer, card, record and the file system's own bookkeeping


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    mixers: MixerOptions | Sequence[MixerOptions] | None,
    dtype: str | None = "bfloat16",
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
    seed: int = 0,
    allow_nonfinite: bool = False,
    command: Sequence[str] | None = None,
    calibration: Mapping[str, Any] | None = None,
) -> Plan:
    """Convert a pretrained Transformer into a student and publish it as a folder that transformers loads.

    Args:
        source: folder or Hub id of a safetensors checkpoint.
        destination: folder to publish; it appears complete and verified, or not at all.
        mixers: what replaces attention, in which layers; None as in `make_plan`.
        dtype: float32, bfloat16 or float16; None keeps each tensor's own.
        max_shard_size: as in `make_plan`.
        overwrite: replace a folder that t2r published before.
        seed: of the new tensors' initial values; equal arguments give equal bytes.
        allow_nonfinite: convert weights that hold NaN or Inf.
        command: the command line, for the model card.
        calibration: an init report (t2r.convert.calibrate), kept in conversion.json.

    Raises:
        InputError: bad input, in one line; nothing is left behind.
        t2r.convert.directio.VerificationError: what was written does not read back.
    """
    source, destination = str(source), Path(destination)
    check_destination(source, destination, overwrite=overwrite)
    plan = make_plan(source, mixers, dtype=dtype, max_shard_size=max_shard_size, seed=seed)
    execute(
        plan,
        destination,
        overwrite=overwrite,
        allow_nonfinite=allow_nonfinite,
        command=command,
        calibration=calibration,
    )
    return plan


def execute(
    plan: Plan,
    destination: Path,
    *,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    command: Sequence[str] | None = None,
    calibration: Mapping[str, Any] | None = None,
) -> None:
    """Carry out a plan. Arguments and errors as in `convert`."""
    check_space(destination, plan.nbytes, plan.checkpoint.copied_files())
    _check_tied(plan)
    sums: dict[str, str] = {}
    with publish(destination, overwrite=overwrite, hashes=sums) as staging:
        sums.update(write_weights(plan.shards, staging, InitialValues(plan), allow_nonfinite=allow_nonfinite))
        for path in plan.checkpoint.copied_files():
            shutil.copyfile(path, staging / path.name)
        write_card(plan, staging, destination, command)
        record = plan.to_json() | {"command": list(command or []), "versions": versions()}
        if calibration is not None:
            record["calibration"] = dict(calibration)
        write_json(staging / RECORD, record)
        (staging / PENDING_CONFIG).write_text(plan.config.to_json_string())


def check_destination(source: str, destination: Path, *, overwrite: bool) -> None:
    """Refuse a destination that is the source, lies within it or holds it, or that would replace what is not ours."""
    target = destination.resolve()
    if Path(source).exists():
        origin = Path(source).resolve()
        if target == origin:
            raise InputError(f"{destination}: output and input are the same folder")
        if target.is_relative_to(origin) or origin.is_relative_to(target):
            raise InputError(f"{destination}: output and input ({source}) lie one within the other")
    elif not is_hub_id(source):
        raise InputError(f"{source}: no such folder, and not a Hub id (org/name)")
    parent = _existing_parent(destination)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"{destination}: cannot be written, {parent} is no folder that can be written to")
    if not destination.exists() or (destination / PENDING_CONFIG).is_file():
        return
    if not overwrite:
        raise InputError(f"{destination}: already exists; pass --overwrite to replace it, or name another folder")
    if not (destination / MANIFEST).is_file():
        raise InputError(f"{destination}: has no {MANIFEST}, so t2r did not write it and does not replace it")


def check_space(destination: Path, nbytes: int, others: Iterable[Path]) -> None:
    """Refuse to start when the disk of `destination` has no room for `nbytes` of weights and copies of `others`."""
    needed = nbytes + sum(path.stat().st_size for path in others) + _SPARE_BYTES
    free = shutil.disk_usage(_existing_parent(destination)).free
    if needed > free:
        raise InputError(f"{destination}: needs {needed / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free")


def _existing_parent(destination: Path) -> Path:
    parent = destination.absolute().parent
    while not parent.exists():
        parent = parent.parent
    return parent


class InitialValues:
    """Initial values of the mixers' new parameters; the values of one layer at a time are kept."""

    def __init__(self, plan: Plan) -> None:
        self._layers = plan.student.model.layers
        self._places = new_tensor_names(plan.student)
        self._seed = plan.seed
        self._layer: int | None = None
        self._values: dict[str, Tensor] = {}

    def value(self, tensor: TensorPlan) -> Tensor:
        """The initial value of one new tensor; the same for the same seed, whatever else is converted."""
        layer, name = self._places[tensor.name]
        if layer != self._layer:
            self._values = self._layers[layer].self_attn.initial_values(layer_generator(self._seed, layer))
            self._layer = layer
        return self._values[name].reshape(tensor.shape)


def write_weights(
    shards: Mapping[str, Sequence[TensorPlan]], folder: Path, new: NewTensors, *, allow_nonfinite: bool = False
) -> dict[str, str]:
    """Write and verify every shard and, for several, their index.

    Returns:
        SHA-256 by file name. Errors as in `write_shard` and `verify_shard`.
    """
    sums: dict[str, str] = {}
    total = sum(tensor.nbytes for tensors in shards.values() for tensor in tensors)
    with _one_torch_thread(), Progress("weights", total) as progress:
        for file, tensors in shards.items():
            path = folder / file
            sums[file] = write_shard(path, tensors, new, allow_nonfinite=allow_nonfinite, advance=progress.advance)
            verify_shard(path, tensors)
    if len(shards) > 1:
        write_json(folder / INDEX, build_index(shards))
    return sums


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """The work is spread over threads of our own already; torch's would only wait for each other on small blocks."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_tied(plan: Plan) -> None:
    """A head that the config calls tied must equal the embedding, or dropping it would change the model."""
    for dropped in plan.dropped:
        if dropped.name != "lm_head.weight" or dropped.source is None:
            continue
        embedding = plan.checkpoint.tensors["model.embed_tokens.weight"]
        head = dropped.source
        same = (head.shape, head.dtype) == (embedding.shape, embedding.dtype) and all(
            torch.equal(a.view(torch.uint8), b.view(torch.uint8))
            for a, b in zip(read_blocks(head), read_blocks(embedding), strict=True)
        )
        if not same:
            raise InputError(
                f"{head.file}: lm_head.weight differs from model.embed_tokens.weight, config.json says "
                "tie_word_embeddings = true"
            )


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
