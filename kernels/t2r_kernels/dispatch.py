"""Which implementation runs, and the checks that every implementation may rely on."""

from __future__ import annotations

import functools
import importlib
import logging
import os
from types import ModuleType

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

BACKENDS = ("auto", "naive", "torch", "triton")
logger = logging.getLogger("t2r_kernels")


@functools.cache
def say_once(message: str) -> None:
    """Log a warning, the first time it is given."""
    logger.warning(message)


@functools.cache
def triton_module(op: str) -> ModuleType | str:
    """`t2r_kernels.<op>.triton`, or in one sentence why it cannot be used here."""
    try:
        return importlib.import_module(f"t2r_kernels.{op}.triton")
    except ImportError as error:
        return str(error)


def choose(op: str, backend: str, tensors: tuple[Tensor, ...], too_large: str | None = None) -> str:
    """The backend that runs `op` on these tensors: "naive", "torch" or "triton".

    too_large: why triton's kernels do not take these sizes, in a few words; None when they do.
    "auto" takes triton on a GPU and torch elsewhere. Where a GPU has to do without triton, that is logged once with its
    reason. "triton" is never replaced by anything else: a ValueError says why it cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend={backend!r} is not one of {', '.join(BACKENDS)}")
    if backend in ("naive", "torch"):
        return backend
    on_gpu = tensors[0].device.type == "cuda"  # ROCm's devices are named cuda too
    if backend == "auto" and not on_gpu:
        return "torch"
    reason = _why_not_triton(op, tensors, on_gpu) or too_large
    if reason is None:
        return "triton"
    if backend == "triton":
        raise ValueError(f"{op}: backend='triton' cannot run: {reason}")
    say_once(f"{op}: torch runs instead of triton, much slower: {reason}")
    return "torch"


def _why_not_triton(op: str, tensors: tuple[Tensor, ...], on_gpu: bool) -> str | None:
    if not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        return f"tensors are on {tensors[0].device.type} and TRITON_INTERPRET=1 is not set"
    if any(x.dtype == torch.float64 for x in tensors):
        return "it does not compute in float64"
    if torch.compiler.is_compiling():
        return None  # dynamo cannot trace an import by name; where triton is missing, the import that follows says so
    module = triton_module(op)
    return module if isinstance(module, str) else None


def watched(x: Tensor) -> bool:
    """Whether something wants to see operators and not what is in them: a compiler, a dispatch mode (selective
    checkpointing, fake tensors), a subclass of Tensor. Without that an operator only costs: as much as the kernels at
    short lengths, and at its first call a second and a half, in which torch imports its compiler."""
    return type(x) is not Tensor or torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None


def without_autocast(device: torch.device) -> torch.autocast:
    """Every backend accumulates in float32 by itself; autocast would round its matrix products to bfloat16."""
    return torch.autocast(device.type, enabled=False)


def check_shape(op: str, name: str, x: Tensor, shape: tuple[int | None, ...], layout: str) -> None:
    """ValueError unless x has this shape (None: any length)."""
    # a loop and not all(...): these checks run at every call, and a generator costs more than what it checks
    fits = len(x.shape) == len(shape)
    for got, want in zip(x.shape, shape, strict=False):
        if want is not None and want != got:
            fits = False
    if not fits:
        wanted = ", ".join("*" if n is None else str(n) for n in shape)
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, must be {layout} = [{wanted}]")


def check_sequences(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """q [B, T, HQ, D], k [B, T, H, D] and v [B, T, H, V] fit each other, HQ is a multiple of H, and T >= 1."""
    if k.dim() != 4:
        raise ValueError(f"{op}: k has shape {tuple(k.shape)}, must be [B, T, H, D]")
    batch, tokens, heads, dim = k.shape
    if 0 in k.shape:
        raise ValueError(f"{op}: k has shape {tuple(k.shape)}, every dimension must be at least 1")
    check_shape(op, "q", q, (batch, tokens, None, dim), "[B, T, HQ, D]")
    check_shape(op, "v", v, (batch, tokens, heads, None), "[B, T, H, V]")
    check_group(op, q.shape[2], heads)


def same_dtype(x: Tensor, like: Tensor) -> Tensor:
    """x in the dtype of `like`; mostly it has that, and to ask is cheaper than `Tensor.to`."""
    return x if x.dtype == like.dtype else x.to(like.dtype)


def check_group(op: str, query_heads: int, heads: int) -> None:
    """Every key/value head serves the same number of query heads."""
    if query_heads == 0 or query_heads % heads:
        raise ValueError(f"{op}: q has {query_heads} heads, must be a multiple of the {heads} heads of k")


def check_same_place(op: str, named: dict[str, Tensor | None]) -> None:
    """All tensors are floating point and on the device of the first."""
    first = next(iter(named.values()))
    assert first is not None
    device = first.device
    for name, x in named.items():
        if x is None:
            continue
        if x.device != device:
            raise ValueError(f"{op}: {name} is on {x.device}, must be on {device} like {next(iter(named))}")
        if not x.is_floating_point():
            raise ValueError(f"{op}: {name} has dtype {x.dtype}, must be floating point")


def count_sequences(op: str, k: Tensor, cu_seqlens: Tensor | None) -> int:
    """N: the batch, or the number of documents bounded by cu_seqlens.

    The bounds themselves are read only where that needs no synchronisation with a GPU and breaks no graph.
    """
    if cu_seqlens is None:
        return k.shape[0]
    if k.shape[0] != 1:
        raise ValueError(f"{op}: k has batch {k.shape[0]}, must be 1 with cu_seqlens")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{op}: cu_seqlens is {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}, must be int32 [N + 1]"
        )
    if cu_seqlens.device != k.device:
        raise ValueError(f"{op}: cu_seqlens is on {cu_seqlens.device}, must be on {k.device} like k")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        first, last, drop = int(cu_seqlens[0]), int(cu_seqlens[-1]), bool((cu_seqlens.diff() < 0).any())
        if first != 0 or last != k.shape[1] or drop:
            raise ValueError(f"{op}: cu_seqlens must rise from 0 to T = {k.shape[1]}, got {first} ... {last}")
    return cu_seqlens.numel() - 1
