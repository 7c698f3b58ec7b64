"""gsa as torch operators, so that torch.compile, selective checkpointing and FSDP see one opaque node each.

Imported by the first call that needs them: defining an operator makes torch import its compiler, which takes seconds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .ops import backward, forward, gradients, setup, state_dtype, states_like


def _nothing(q: Tensor) -> Tensor:
    """What an operator returns in the place of an output that was not asked for."""
    return q.new_empty(0, dtype=state_dtype(q))


@torch.library.custom_op("t2r_kernels::gsa_forward", mutates_args=())
def gsa_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    initial_k: Tensor | None,
    initial_v: Tensor | None,
    cu_seqlens: Tensor | None,
    visible: Tensor | None,
    scale: float,
    output_final_state: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.forward`, with empty tensors in the place of None."""
    o, *final = forward(
        q, k, v, log_alpha, initial_k, initial_v, cu_seqlens, visible, scale, output_final_state, backend
    )
    final_k, final_v = (_nothing(q) if x is None else x for x in final)
    return o, final_k, final_v


@gsa_forward.register_fake
def _(q, k, v, log_alpha, initial_k, initial_v, cu_seqlens, visible, scale, output_final_state, backend):
    o = q.new_empty(*q.shape[:3], v.shape[-1])
    if output_final_state:
        return o, *states_like(k, v, log_alpha, cu_seqlens)
    return o, _nothing(q), _nothing(q)


@torch.library.custom_op("t2r_kernels::gsa_backward", mutates_args=())
def gsa_backward(
    do: Tensor,
    dfinal_k: Tensor | None,
    dfinal_v: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    initial_k: Tensor | None,
    initial_v: Tensor | None,
    cu_seqlens: Tensor | None,
    visible: Tensor | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`ops.backward`, with empty tensors in the place of None."""
    dq, dk, dv, dlog_alpha, *dinitial = backward(
        do, dfinal_k, dfinal_v, q, k, v, log_alpha, initial_k, initial_v, cu_seqlens, visible, scale, backend
    )
    dinitial_k, dinitial_v = (_nothing(q) if x is None else x for x in dinitial)
    return dq, dk, dv, dlog_alpha, dinitial_k, dinitial_v


@gsa_backward.register_fake
def _(do, dfinal_k, dfinal_v, q, k, v, log_alpha, initial_k, initial_v, cu_seqlens, visible, scale, backend):
    like = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    dinitial = [
        _nothing(q) if x is None else x.new_empty(x.shape, dtype=state_dtype(k)) for x in (initial_k, initial_v)
    ]
    return *like, log_alpha.new_empty(log_alpha.shape, dtype=state_dtype(k)), *dinitial


def _gradients(ctx, do, dfinal_k, dfinal_v):
    return gradients(ctx, do, dfinal_k, dfinal_v, gsa_backward)


gsa_forward.register_autograd(_gradients, setup_context=setup)
