"""The kernels as torch operators, so that torch.compile, selective checkpointing and FSDP see one opaque node each."""

import torch
from torch import Tensor

from .backward import backward
from .common import choose_blocks, choose_numerics, find_chunks
from .forward import forward
from .walk import fits
from .walk_backward import walk_backward
from .walk_forward import walk_forward

State = tuple[Tensor, Tensor]


def _run_forward(q, k, v, log_alpha, visible, scale, initial, final, cu_seqlens):
    sizes = (q.shape[2], k.shape[2], q.shape[3], v.shape[3], log_alpha.shape[3])
    if fits(*sizes, q.dtype):
        return walk_forward(q, k, v, log_alpha, visible, scale, initial, final, cu_seqlens)
    numerics = choose_numerics(q.dtype)
    blocks = choose_blocks(*sizes, numerics.store.itemsize)
    chunks = find_chunks(q.shape[0], q.shape[1], blocks.chunk, cu_seqlens)
    return forward(q, k, v, log_alpha, visible, scale, initial, final, chunks, blocks, numerics)


def _run_backward(q, k, v, log_alpha, visible, do, dfinal, scale, initial, cu_seqlens):
    sizes = (q.shape[2], k.shape[2], q.shape[3], v.shape[3], log_alpha.shape[3])
    if fits(*sizes, q.dtype):
        return walk_backward(q, k, v, log_alpha, visible, do, dfinal, scale, initial, cu_seqlens)
    numerics = choose_numerics(q.dtype)
    blocks = choose_blocks(*sizes, numerics.store.itemsize)
    chunks = find_chunks(q.shape[0], q.shape[1], blocks.chunk, cu_seqlens)
    return backward(q, k, v, log_alpha, visible, do, dfinal, scale, initial, chunks, blocks, numerics)


def _states_like(k: Tensor, v: Tensor, log_alpha: Tensor, cu_seqlens: Tensor | None) -> State:
    N = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (N, k.shape[2], log_alpha.shape[-1])
    return (
        k.new_empty(*shape, k.shape[-1], dtype=torch.float32),
        v.new_empty(*shape, v.shape[-1], dtype=torch.float32),
    )


def _pair(first: Tensor | None, second: Tensor | None) -> State | None:
    return None if first is None or second is None else (first.contiguous(), second.contiguous())


def _forward(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """o, and the final states (empty tensors unless asked for)."""
    q, k, v, log_alpha = (x.contiguous() for x in (q, k, v, log_alpha))
    visible = None if visible is None else visible.contiguous()
    final = _states_like(k, v, log_alpha, cu_seqlens) if output_final_state else None
    o = _run_forward(q, k, v, log_alpha, visible, scale, _pair(initial_k, initial_v), final, cu_seqlens)
    if final is None:
        return o, q.new_empty(0, dtype=torch.float32), q.new_empty(0, dtype=torch.float32)
    return o, *final


gsa_forward = torch.library.custom_op("t2r_kernels::gsa_forward", mutates_args=())(_forward)


@gsa_forward.register_fake
def _(q, k, v, log_alpha, initial_k, initial_v, cu_seqlens, visible, scale, output_final_state):
    o = q.new_empty(*q.shape[:3], v.shape[-1])
    if output_final_state:
        return o, *_states_like(k, v, log_alpha, cu_seqlens)
    return o, q.new_empty(0, dtype=torch.float32), q.new_empty(0, dtype=torch.float32)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dlog_alpha, and the gradients of the initial states (empty tensors without initial states)."""
    do, q, k, v, log_alpha = (x.contiguous() for x in (do, q, k, v, log_alpha))
    visible = None if visible is None else visible.contiguous()
    dq, dk, dv, dlog_alpha, dinitial = _run_backward(
        q, k, v, log_alpha, visible, do, _pair(dfinal_k, dfinal_v), scale, _pair(initial_k, initial_v), cu_seqlens
    )
    if dinitial is None:
        dinitial = (q.new_empty(0, dtype=torch.float32), q.new_empty(0, dtype=torch.float32))
    return dq, dk, dv, dlog_alpha, *dinitial


@gsa_backward.register_fake
def _(do, dfinal_k, dfinal_v, q, k, v, log_alpha, initial_k, initial_v, cu_seqlens, visible, scale):
    like = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    dinitial = [
        q.new_empty(0, dtype=torch.float32) if x is None else torch.empty_like(x, dtype=torch.float32)
        for x in (initial_k, initial_v)
    ]
    return *like, log_alpha.new_empty(log_alpha.shape, dtype=torch.float32), *dinitial


def _setup(ctx, inputs, output):
    q, k, v, log_alpha, initial_k, initial_v, cu_seqlens, visible, ctx.scale, ctx.final = inputs
    ctx.save_for_backward(q, k, v, log_alpha, initial_k, initial_v, cu_seqlens, visible)


def _gradients(ctx, do, dfinal_k, dfinal_v):
    q, k, v, log_alpha, initial_k, initial_v, cu_seqlens, visible = ctx.saved_tensors
    if not ctx.final:
        dfinal_k = dfinal_v = None
    dq, dk, dv, dlog_alpha, dinitial_k, dinitial_v = gsa_backward(
        do, dfinal_k, dfinal_v, q, k, v, log_alpha, initial_k, initial_v, cu_seqlens, visible, ctx.scale
    )
    dlog_alpha = dlog_alpha.to(log_alpha.dtype)
    if initial_k is None:
        dinitial_k = dinitial_v = None
    else:
        dinitial_k, dinitial_v = dinitial_k.to(initial_k.dtype), dinitial_v.to(initial_v.dtype)
    return dq, dk, dv, dlog_alpha, dinitial_k, dinitial_v, None, None, None, None


gsa_forward.register_autograd(_gradients, setup_context=_setup)


def gsa_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    scale: float,
    initial_state: State | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    visible: Tensor | None = None,
) -> tuple[Tensor, State | None]:
    """Shapes as in `t2r_kernels.gsa`; q, k and v are brought to q's dtype. Deterministic: no atomics."""
    initial_k, initial_v = initial_state or (None, None)
    # Without gradients, and where nothing watches operators, the operator's own cost (as much as the kernels' at short
    # lengths) is left out.
    plain = type(q) is Tensor and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    o, final_k, final_v = (_forward if plain else gsa_forward)(
        q, k.to(q.dtype), v.to(q.dtype), log_alpha, initial_k, initial_v, cu_seqlens, visible, scale, output_final_state
    )
    return o, (final_k, final_v) if output_final_state else None
