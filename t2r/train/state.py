"""What a checkpoint keeps of the model and its optimiser: the trained parameters and each one's moments, by name.

Safetensors files written and read by torch's distributed checkpoint, each process its own shards, so that a run goes on
with any number of processes, with or without FSDP. Nothing in them is a pickle.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

_FILE_BYTES = 4 << 30
_STEP = "step"  # AdamW's count of updates, a number; the rest is shaped like its parameter


def save_state(folder: Path, model: nn.Module, optimizer: Any, *, sharded: bool) -> None:
    """Write `folder`. With `sharded` (FSDP) all processes call it, otherwise one does.

    Raises:
        OSError: it could not be written.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in _trained(model):
        tensors[name] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"{name}|{key}"] = value[None] if key == _STEP else value
    writer = dcp.HuggingFaceStorageWriter(
        str(folder), fqn_to_index_mapping=_split(tensors), save_distributed=True, thread_count=1
    )
    with _quiet():
        try:
            dcp.save(tensors, storage_writer=writer, no_dist=not sharded)
        except CheckpointException as error:  # a process's own failure, a full disk for example, is in it
            raise next(iter(error.failures.values()))[0] from error


def load_state(folder: Path, model: nn.Module, optimizer: Any, *, sharded: bool) -> None:
    """Read `folder` into the trained parameters of `model` and into `optimizer`.

    Raises:
        AssertionError: the parameters of the checkpoint are not those that are trained.
    """
    stored = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    moments = [name.partition("|") for name in stored if "|" in name]
    parameters = dict(_trained(model))
    differing = parameters.keys() ^ {name for name in stored if "|" not in name}
    assert not differing, f"{folder}: trained parameters differ: {sorted(differing)[:3]}"
    tensors: dict[str, Tensor] = {name: parameter.detach() for name, parameter in parameters.items()}
    for name, _, key in moments:
        like = tensors[name]
        tensors[f"{name}|{key}"] = torch.zeros(1, device=like.device) if key == _STEP else torch.zeros_like(like)
    with _quiet():
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=not sharded)
    for name, _, key in moments:
        value = tensors[f"{name}|{key}"]
        optimizer.state[parameters[name]][key] = value[0] if key == _STEP else value


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warning that a single process saves alone, which is what was asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _split(tensors: dict[str, Tensor]) -> dict[str, int]:
    """The number of the file of each tensor; a file is held in memory while it is written."""
    files, number, size = {}, 1, 0
    for name, tensor in tensors.items():
        size += tensor.numel() * tensor.element_size()
        if size > _FILE_BYTES:
            number, size = number + 1, tensor.numel() * tensor.element_size()
        files[name] = number
    return files
