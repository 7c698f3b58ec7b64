"""gla as torch operators, so that torch.compile, selective checkpointing and FSDP see one opaque node each.

Imported by the first call that needs them: defining an operator makes torch import its compiler, which takes seconds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .ops import backward, forward, gradients, setup, state_dtype, state_like


def _nothing(q: Tensor) -> Tensor:
    """What an operator returns in the place of an output that was not asked for."""
    return q.new_empty(0, dtype=state_dtype(q))


@torch.library.custom_op("t2r_kernels::gla_forward", mutates_args=())
def gla_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    write: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    gate: str | None,
    scale: float,
    output_final_state: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """`ops.forward`, with an empty tensor in the place of None."""
    o, final = forward(q, k, v, log_decay, write, initial, cu_seqlens, gate, scale, output_final_state, backend)
    return o, _nothing(q) if final is None else final


@gla_forward.register_fake
def _(q, k, v, log_decay, write, initial, cu_seqlens, gate, scale, output_final_state, backend):
    o = q.new_empty(*q.shape[:3], v.shape[-1])
    return o, state_like(k, v, cu_seqlens) if output_final_state else _nothing(q)


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
    gate: str | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`ops.backward`, with empty tensors in the place of None."""
    dq, dk, dv, *small = backward(do, dfinal, q, k, v, log_decay, write, initial, cu_seqlens, gate, scale, backend)
    dlog_decay, dwrite, dinitial = (_nothing(q) if z is None else z for z in small)
    return dq, dk, dv, dlog_decay, dwrite, dinitial


@gla_backward.register_fake
def _(do, dfinal, q, k, v, log_decay, write, initial, cu_seqlens, gate, scale, backend):
    like = [torch.empty_like(z, memory_format=torch.contiguous_format) for z in (q, k, v)]
    small = [
        _nothing(q) if z is None else z.new_empty(z.shape, dtype=state_dtype(q)) for z in (log_decay, write, initial)
    ]
    return *like, *small


def _gradients(ctx, do, dfinal):
    return gradients(ctx, do, dfinal, gla_backward)


gla_forward.register_autograd(_gradients, setup_context=setup)
