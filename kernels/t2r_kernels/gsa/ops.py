"""gsa under autograd, in Triton and (for compilers, which must see one opaque node) in torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import dispatch
from .chunk import gsa_chunk, gsa_chunk_backward
from .naive import State


def states_like(k: Tensor, v: Tensor, log_alpha: Tensor, cu_seqlens: Tensor | None) -> State:
    N = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (N, k.shape[2], log_alpha.shape[-1])
    dtype = state_dtype(k)
    return k.new_empty(*shape, k.shape[-1], dtype=dtype), v.new_empty(*shape, v.shape[-1], dtype=dtype)


def state_dtype(k: Tensor) -> torch.dtype:
    return torch.promote_types(k.dtype, torch.float32)


def _pair(first: Tensor | None, second: Tensor | None) -> State | None:
    return None if first is None or second is None else (first.contiguous(), second.contiguous())


def forward(
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
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """o, and the final states (None unless asked for). backend: "triton" or "torch"."""
    if backend == "torch":
        initial = _pair(initial_k, initial_v)
        with dispatch.without_autocast(q.device):
            o, final = gsa_chunk(q, k, v, log_alpha, scale, initial, output_final_state, cu_seqlens, visible)
        return o, *(final or (None, None))
    from .triton.ops import run_forward

    q, k, v, log_alpha = (x.contiguous() for x in (q, k, v, log_alpha))
    visible = None if visible is None else visible.contiguous()
    final = states_like(k, v, log_alpha, cu_seqlens) if output_final_state else None
    o = run_forward(q, k, v, log_alpha, visible, scale, _pair(initial_k, initial_v), final, cu_seqlens)
    return o, *(final or (None, None))


def backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """dq, dk, dv, dlog_alpha, and the gradients of the initial states (None without initial states)."""
    if backend == "torch":
        dfinal, initial = _pair(dfinal_k, dfinal_v), _pair(initial_k, initial_v)
        with dispatch.without_autocast(q.device):
            dq, dk, dv, dlog_alpha, dinitial_k, dinitial_v = gsa_chunk_backward(
                do, dfinal, q, k, v, log_alpha, scale, initial, cu_seqlens, visible
            )
        return dq, dk, dv, dlog_alpha, *((None, None) if initial is None else (dinitial_k, dinitial_v))
    from .triton.ops import run_backward

    do, q, k, v, log_alpha = (x.contiguous() for x in (do, q, k, v, log_alpha))
    visible = None if visible is None else visible.contiguous()
    dq, dk, dv, dlog_alpha, dinitial = run_backward(
        q, k, v, log_alpha, visible, do, _pair(dfinal_k, dfinal_v), scale, _pair(initial_k, initial_v), cu_seqlens
    )
    return dq, dk, dv, dlog_alpha, *(dinitial or (None, None))


def setup(ctx, inputs, output):
    """Keeps what `gradients` needs: the inputs."""
    q, k, v, log_alpha, initial_k, initial_v, cu_seqlens, visible, ctx.scale, ctx.final, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, log_alpha, initial_k, initial_v, cu_seqlens, visible)


def gradients(ctx, do, dfinal_k, dfinal_v, run: Callable):
    """The gradients of `forward`'s inputs, by `run` (`backward` or its operator)."""
    q, k, v, log_alpha, initial_k, initial_v, cu_seqlens, visible = ctx.saved_tensors
    if not ctx.final:
        dfinal_k = dfinal_v = None
    dq, dk, dv, dlog_alpha, dinitial_k, dinitial_v = run(
        do, dfinal_k, dfinal_v, q, k, v, log_alpha, initial_k, initial_v, cu_seqlens, visible, ctx.scale, ctx.backend
    )
    dlog_alpha = dlog_alpha.to(log_alpha.dtype)
    if initial_k is None:
        dinitial_k = dinitial_v = None
    else:
        dinitial_k, dinitial_v = dinitial_k.to(initial_k.dtype), dinitial_v.to(initial_v.dtype)
    return dq, dk, dv, dlog_alpha, dinitial_k, dinitial_v, None, None, None, None, None


class _Direct(torch.autograd.Function):
    """`forward` and `backward` as they are, without the cost of operators."""

    @staticmethod
    def forward(ctx, *inputs):
        output = forward(*inputs)
        setup(ctx, inputs, output)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, dfinal_k, dfinal_v):  # type: ignore[override]
        return gradients(ctx, do, dfinal_k, dfinal_v, backward)


def gsa_operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    scale: float,
    initial_state: State | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    visible: Tensor | None,
    backend: str,
) -> tuple[Tensor, State | None]:
    """Shapes as in `t2r_kernels.gsa`; q, k and v are brought to q's dtype. backend: "triton" or "torch"."""
    initial_k, initial_v = initial_state or (None, None)
    run: Callable
    if dispatch.watched(q):
        from .operators import gsa_forward

        run = gsa_forward
    else:
        run = _Direct.apply if torch.is_grad_enabled() else forward
    o, final_k, final_v = run(
        q, dispatch.same_dtype(k, q), dispatch.same_dtype(v, q), log_alpha, initial_k, initial_v, cu_seqlens, visible,
        float(scale), output_final_state, backend,
    )  # fmt: skip
    if not output_final_state:
        return o, None
    assert final_k is not None
    assert final_v is not None
    return o, (final_k, final_v)
