"""What one call launches: the forward and the backward pass as sequences of kernels."""

import torch
from torch import Tensor

from ...triton_chunks import Chunks, find_chunks
from ...triton_passes import repeated
from . import configs
from .backward import gated_gradients, plain_gradient
from .common import Plan, plan_for
from .decays import decays_of
from .forward import read_gated, read_plain
from .pairs import pair_scores
from .states import gradients_of, states_of


def _plan(q: Tensor, k: Tensor, v: Tensor, gate: str | None, cu_seqlens: Tensor | None) -> tuple[Plan, Chunks]:
    plan = plan_for(gate, q.shape[2], k.shape[2], q.shape[3], v.shape[3], q.dtype)
    return plan, find_chunks(q.shape[0], q.shape[1], configs.CHUNK, cu_seqlens)


@repeated
def run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    write: Tensor | None,
    initial: Tensor | None,
    final: Tensor | None,
    cu_seqlens: Tensor | None,
    gate: str | None,
    scale: float,
) -> Tensor:
    """o in q's dtype; writes `final` if given. All tensors are contiguous."""
    plan, chunks = _plan(q, k, v, gate, cu_seqlens)
    decays = decays_of(log_decay, cu_seqlens, plan)
    swapped = gate == "value"
    y, x = (v, k) if swapped else (k, v)
    states, _ = states_of(y, x, write, log_decay, decays, initial, final, plan, chunks, configs.CHUNK, swapped)
    if swapped:
        return read_gated(q, y, x, write, decays, states, scale, plan, chunks, configs.CHUNK)
    pairs = pair_scores(q, y, write, decays, scale, cu_seqlens, plan, chunks)
    return read_plain(q, y, x, write, decays, pairs, states, scale, plan, chunks, configs.CHUNK)


@repeated
def run_backward(
    do: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    write: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    gate: str | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """dq, dk, dv in q's dtype, and in fp32 the gradients of log_decay, write and the initial state (None without
    them). All tensors are contiguous."""
    plan, chunks = _plan(q, k, v, gate, cu_seqlens)
    decays = decays_of(log_decay, cu_seqlens, plan)
    swapped = gate == "value"
    r, p, y, x = (do, q, v, k) if swapped else (q, do, k, v)
    dinitial = None if initial is None else torch.empty_like(initial, dtype=torch.float32)
    place = (plan, chunks, configs.CHUNK)
    states, gamma = states_of(y, x, write, log_decay, decays, initial, None, *place, swapped)
    dstates = gradients_of(r, p, decays, gamma, scale, dfinal, dinitial, *place, swapped)
    dr, dy, dgate, dwrite = gated_gradients(
        r, p, y, x, write, log_decay, decays, states, dstates, scale, not swapped, cu_seqlens, *place
    )  # fmt: skip
    pairs = pair_scores(r, y, write, decays, scale, cu_seqlens, plan, chunks)
    dx = plain_gradient(r, p, y, x, write, decays, pairs, dstates, scale, *place)
    if swapped:
        dq, dk, dv = read_plain(r, y, x, write, decays, pairs, states, scale, *place), dx, dy
    else:
        dq, dk, dv = dr, dy, dx
    return dq, dk, dv, dgate, dwrite, dinitial
