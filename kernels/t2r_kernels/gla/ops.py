"""gla under autograd, in Triton and (for compilers, which must see one opaque node) in torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import dispatch
from .chunk import gla_chunk, gla_chunk_backward


def state_dtype(k: Tensor) -> torch.dtype:
    """The dtype of states and of the gradients of gates, write weights and states."""
    return torch.promote_types(k.dtype, torch.float32)


def state_like(k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """An empty state [N, H, D, V]."""
    N = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return k.new_empty(N, k.shape[2], k.shape[3], v.shape[3], dtype=state_dtype(k))


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


def forward(
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
) -> tuple[Tensor, Tensor | None]:
    """o, and the final state (None unless asked for). backend: "triton" or "torch"."""
    if backend == "torch":
        with dispatch.without_autocast(q.device):
            return gla_chunk(q, k, v, log_decay, gate, write, scale, initial, output_final_state, cu_seqlens)
    from .triton.ops import run_forward

    final = state_like(k, v, cu_seqlens) if output_final_state else None
    q, k, v = (z.contiguous() for z in (q, k, v))
    log_decay, write, initial = _contiguous(log_decay, write, initial)
    return run_forward(q, k, v, log_decay, write, initial, final, cu_seqlens, gate, scale), final


def backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """dq, dk, dv in their dtypes and, in `state_dtype`, those of log_decay, write and the initial state (None without
    them)."""
    if backend == "torch":
        with dispatch.without_autocast(q.device):
            dq, dk, dv, dlog_decay, dwrite, dinitial = gla_chunk_backward(
                do, dfinal, q, k, v, log_decay, gate, write, scale, initial, cu_seqlens
            )
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dlog_decay, dwrite, None if initial is None else dinitial
    from .triton.ops import run_backward

    do, q, k, v = (z.contiguous() for z in (do, q, k, v))
    dfinal, log_decay, write, initial = _contiguous(dfinal, log_decay, write, initial)
    return run_backward(do, dfinal, q, k, v, log_decay, write, initial, cu_seqlens, gate, scale)


def setup(ctx, inputs, output):
    """Keeps what `gradients` needs: the inputs."""
    *tensors, ctx.gate, ctx.scale, ctx.final, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def gradients(ctx, do, dfinal, run: Callable):
    """The gradients of `forward`'s inputs, by `run` (`backward` or its operator)."""
    q, k, v, log_decay, write, initial, cu_seqlens = ctx.saved_tensors
    dq, dk, dv, *small = run(
        do, dfinal if ctx.final else None, q, k, v, log_decay, write, initial, cu_seqlens, ctx.gate, ctx.scale,
        ctx.backend,
    )  # fmt: skip
    small = [None if z is None else dz.to(z.dtype) for z, dz in zip((log_decay, write, initial), small, strict=True)]
    return dq, dk, dv, *small, None, None, None, None, None


class _Direct(torch.autograd.Function):
    """`forward` and `backward` as they are, without the cost of operators."""

    @staticmethod
    def forward(ctx, *inputs):
        output = forward(*inputs)
        setup(ctx, inputs, output)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, dfinal):  # type: ignore[override]
        return gradients(ctx, do, dfinal, backward)


def gla_operator(
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
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """Shapes as in `t2r_kernels.gla`; k and v are brought to q's dtype. backend: "triton" or "torch"."""
    run: Callable
    if dispatch.watched(q):
        from .operators import gla_forward

        run = gla_forward
    else:
        run = _Direct.apply if torch.is_grad_enabled() else forward
    o, final = run(
        q, dispatch.same_dtype(k, q), dispatch.same_dtype(v, q), log_decay, write, initial_state, cu_seqlens, gate,
        float(scale), output_final_state, backend,
    )  # fmt: skip
    return o, final if output_final_state else None
