"""Gated linear attention as its definition reads (arXiv 2312.06635, equation 3): one token after the other."""

from __future__ import annotations

import torch
from torch import Tensor


def rows_of_state(x: Tensor, gate: str | None) -> Tensor:
    """A gate or write weight of one token [B, H, ...] so that it multiplies the state [B, H, D, V]."""
    if gate == "key":
        return x[..., None]
    if gate == "value":
        return x[..., None, :]
    return x[..., None, None]


def gla_naive(
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
    """Shapes as in `t2r_kernels.gla`. Computes in float32, or in float64 when q is float64."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    out_dtype, (batch, tokens, heads, dim) = q.dtype, k.shape
    sequences = batch
    if cu_seqlens is None:
        spans = [(slice(None), slice(0, tokens))]
    else:
        bounds = cu_seqlens.tolist()
        sequences = len(bounds) - 1
        spans = [(slice(n, n + 1), slice(bounds[n], bounds[n + 1])) for n in range(sequences)]
    if initial_state is None:
        initial_state = k.new_zeros(sequences, heads, dim, v.shape[-1], dtype=dtype)
    q, k, v = q.unflatten(2, (heads, -1)).to(dtype), k.to(dtype), v.to(dtype)
    outputs, final = [], []
    for rows, span in spans:
        state = initial_state[rows].to(dtype)
        for t in range(span.start, span.stop):
            update = k[:, t, :, :, None] * v[:, t, :, None]
            if write is not None:
                update = update * rows_of_state(write[:, t].to(dtype), gate)
            if log_decay is not None:
                state = state * rows_of_state(log_decay[:, t].to(dtype).exp(), gate)
            state = state + update
            outputs.append(scale * q[:, t] @ state)
        final.append(state)
    o = torch.stack(outputs, 1).flatten(2, 3).to(out_dtype)
    return o, torch.cat(final) if output_final_state else None


def gla_step_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    gate: str | None,
    write: Tensor | None,
    scale: float,
) -> Tensor:
    """One token of the recurrence; `state` is overwritten. Shapes as in `t2r_kernels.gla_step`."""
    dtype = state.dtype
    keys, values = k.to(dtype)[..., None], v.to(dtype)[:, :, None]
    if write is not None:
        weight = rows_of_state(write.to(dtype), gate)
        keys, values = (keys, values * weight) if gate == "value" else (keys * weight, values)
    if log_decay is not None:
        state.mul_(rows_of_state(log_decay.to(dtype).exp(), gate))
    state.addcmul_(keys, values)
    return (scale * q.to(dtype).unflatten(1, (k.shape[1], -1)) @ state).flatten(1, 2).to(q.dtype)
