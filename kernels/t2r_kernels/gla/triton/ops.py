"""The kernels as torch operators, so that torch.compile, selective checkpointing and FSDP see one opaque node each."""

import torch
from torch import Tensor

from ... import dispatch
from ...gsa.triton.common import Chunks, find_chunks
from . import launch
from .backward import gated_gradients, plain_gradient
from .common import Plan, plan_for
from .forward import read_gated, read_plain
from .pairs import pair_scores
from .states import gradients_of, states_of


def _plan(q: Tensor, k: Tensor, v: Tensor, gate: str, cu_seqlens: Tensor | None) -> tuple[Plan, Chunks]:
    plan = plan_for(gate, q.shape[2], k.shape[2], q.shape[3], v.shape[3], q.dtype)
    return plan, find_chunks(q.shape[0], q.shape[1], launch.CHUNK, cu_seqlens)


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


def _nothing(q: Tensor) -> Tensor:
    """What an operator returns in the place of an output that was not asked for."""
    return q.new_empty(0, dtype=torch.float32)


def _final_like(k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    N = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return k.new_empty(N, k.shape[2], k.shape[3], v.shape[3], dtype=torch.float32)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    write: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    gate: str,
    scale: float,
    output_final_state: bool,
) -> tuple[Tensor, Tensor]:
    """o, and the final state (an empty tensor unless asked for)."""
    q, k, v = (z.contiguous() for z in (q, k, v))
    log_decay, write, initial = _contiguous(log_decay, write, initial)
    plan, chunks = _plan(q, k, v, gate, cu_seqlens)
    final = _final_like(k, v, cu_seqlens) if output_final_state else None
    swapped = gate == "value"
    y, x = (v, k) if swapped else (k, v)
    states, _ = states_of(y, x, write, log_decay, initial, final, plan, chunks, launch.CHUNK, swapped)
    if swapped:
        o = read_gated(q, y, x, write, log_decay, states, scale, plan, chunks, launch.CHUNK)
    else:
        pairs = pair_scores(q, y, write, log_decay, scale, cu_seqlens, plan, chunks)
        o = read_plain(q, y, x, write, log_decay, pairs, states, scale, plan, chunks, launch.CHUNK)
    return o, _nothing(q) if final is None else final


gla_forward = torch.library.custom_op("t2r_kernels::gla_forward", mutates_args=())(_forward)


@gla_forward.register_fake
def _(q, k, v, log_decay, write, initial, cu_seqlens, gate, scale, output_final_state):
    return q.new_empty(*q.shape[:3], v.shape[-1]), _final_like(k, v, cu_seqlens) if output_final_state else _nothing(q)


@torch.library.custom_op("t2r_kernels::gla_backward", mutates_args=())
def gla_backward(
    do: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    write: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    gate: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, and in fp32 the gradients of log_decay, write and the initial state (empty tensors without them)."""
    do, q, k, v = (z.contiguous() for z in (do, q, k, v))
    dfinal, log_decay, write, initial = _contiguous(dfinal, log_decay, write, initial)
    plan, chunks = _plan(q, k, v, gate, cu_seqlens)
    swapped = gate == "value"
    r, p, y, x = (do, q, v, k) if swapped else (q, do, k, v)
    dinitial = None if initial is None else torch.empty_like(initial, dtype=torch.float32)
    place = (plan, chunks, launch.CHUNK)
    states, gamma = states_of(y, x, write, log_decay, initial, None, *place, swapped)
    dstates = gradients_of(r, p, log_decay, gamma, scale, dfinal, dinitial, *place, swapped)
    dr, dy, dgate, dwrite = gated_gradients(
        r, p, y, x, write, log_decay, states, dstates, scale, not swapped, cu_seqlens, *place
    )  # fmt: skip
    pairs = pair_scores(r, y, write, log_decay, scale, cu_seqlens, plan, chunks)
    dx = plain_gradient(r, p, y, x, write, log_decay, pairs, dstates, scale, *place)
    if swapped:
        dq, dk, dv = read_plain(r, y, x, write, log_decay, pairs, states, scale, *place), dx, dy
    else:
        dq, dk, dv = dr, dy, dx
    small = (_nothing(q) if z is None else z for z in (dgate, dwrite, dinitial))
    return dq, dk, dv, *small


@gla_backward.register_fake
def _(do, dfinal, q, k, v, log_decay, write, initial, cu_seqlens, gate, scale):
    like = [torch.empty_like(z, memory_format=torch.contiguous_format) for z in (q, k, v)]
    small = [
        _nothing(q) if z is None else z.new_empty(z.shape, dtype=torch.float32) for z in (log_decay, write, initial)
    ]
    return *like, *small


def _setup(ctx, inputs, output):
    *tensors, ctx.gate, ctx.scale, ctx.final = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, do, dfinal):
    q, k, v, log_decay, write, initial, cu_seqlens = ctx.saved_tensors
    dq, dk, dv, *small = gla_backward(
        do, dfinal if ctx.final else None, q, k, v, log_decay, write, initial, cu_seqlens, ctx.gate, ctx.scale
    )
    small = [None if z is None else dz.to(z.dtype) for z, dz in zip((log_decay, write, initial), small, strict=True)]
    return dq, dk, dv, *small, None, None, None, None


gla_forward.register_autograd(_gradients, setup_context=_setup)


def gla_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    gate: str | None,
    write: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Shapes as in `t2r_kernels.gla`; k and v are brought to q's dtype. Deterministic: no atomics."""
    # Without gradients, and where nothing watches operators, the operator's own cost is left out.
    plain = not torch.is_grad_enabled() and not dispatch.watched(q)
    o, final = (_forward if plain else gla_forward)(
        q, k.to(q.dtype), v.to(q.dtype), log_decay, write, initial_state, cu_seqlens, gate or "none", float(scale),
        output_final_state,
    )  # fmt: skip
    return o, final if output_final_state else None
