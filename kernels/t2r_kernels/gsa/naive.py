"""Gated Slot Attention as its definition reads (arXiv 2409.07146, equations 5 to 7): one token after the other."""

from __future__ import annotations

import torch
from torch import Tensor

State = tuple[Tensor, Tensor]


def zero_state(k: Tensor, v: Tensor, log_alpha: Tensor, sequences: int) -> State:
    """Empty slots K [N, H, M, D] and V [N, H, M, V] for `sequences` = N, in float32 or, for float64 k, in float64."""
    dtype, (heads, slots) = torch.promote_types(k.dtype, torch.float32), log_alpha.shape[-2:]
    return (
        k.new_zeros(sequences, heads, slots, k.shape[-1], dtype=dtype),
        v.new_zeros(sequences, heads, slots, v.shape[-1], dtype=dtype),
    )


def hide(scores: Tensor, visible: Tensor | None) -> Tensor:
    """scores [B, H, G, M] with -inf for the slots from visible [B] on."""
    if visible is None:
        return scores
    slots = torch.arange(scores.shape[-1], device=scores.device)
    return scores.masked_fill(slots >= visible[:, None, None, None], -torch.inf)


def gsa_naive(
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
    """Shapes as in `t2r_kernels.gsa`. Computes in float32, or in float64 when q is float64."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    out_dtype, (batch, tokens, heads, _) = q.dtype, k.shape
    sequences = batch
    if cu_seqlens is None:
        spans = [(slice(None), slice(0, tokens))]
    else:
        bounds = cu_seqlens.tolist()
        sequences = len(bounds) - 1
        spans = [(slice(n, n + 1), slice(bounds[n], bounds[n + 1])) for n in range(sequences)]
    if initial_state is None:
        initial_state = zero_state(k, v, log_alpha, sequences)
    # the query heads of a group become a dimension of their own and share the state by broadcasting
    q, k, v, log_alpha = (x.to(dtype) for x in (q.unflatten(2, (heads, -1)), k, v, log_alpha))
    outputs, final_k, final_v = [], [], []
    for rows, span in spans:
        state_k, state_v = (s[rows].to(dtype) for s in initial_state)
        for t in range(span.start, span.stop):
            alpha = log_alpha[:, t].exp()[..., None]
            write = -torch.expm1(log_alpha[:, t])[..., None]  # 1 - alpha, without its cancellation near alpha = 1
            state_k = alpha * state_k + write * k[:, t, :, None]
            state_v = alpha * state_v + write * v[:, t, :, None]
            scores = hide(scale * q[:, t] @ state_k.mT, None if visible is None else visible[:, t])
            outputs.append(scores.softmax(-1) @ state_v)
        final_k.append(state_k)
        final_v.append(state_v)
    o = torch.stack(outputs, 1).flatten(2, 3).to(out_dtype)
    return o, (torch.cat(final_k), torch.cat(final_v)) if output_final_state else None


def gsa_step_torch(
    q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, state: State, scale: float, visible: Tensor | None = None
) -> Tensor:
    """One token of the recurrence; `state` is overwritten. Shapes as in `t2r_kernels.gsa_step`."""
    state_k, state_v = state
    dtype = state_k.dtype
    alpha = log_alpha.to(dtype).exp()[..., None]
    write = -torch.expm1(log_alpha.to(dtype))[..., None]
    state_k.mul_(alpha).addcmul_(write, k.to(dtype)[:, :, None])
    state_v.mul_(alpha).addcmul_(write, v.to(dtype)[:, :, None])
    scores = hide(scale * q.to(dtype).unflatten(1, (k.shape[1], -1)) @ state_k.mT, visible)
    return (scores.softmax(-1) @ state_v).flatten(1, 2).to(q.dtype)
