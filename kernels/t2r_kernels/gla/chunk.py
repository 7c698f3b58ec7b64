"""Gated linear attention in blocks of tokens, in plain torch: any device, float32 or float64.

The gate scales the rows of a state S [R, X]: R = D for a gate on the key side, R = V (the state transposed) for one on
the value side. A scalar gate, and none, need one decay per pair of tokens instead of one per pair and row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..blocks import Blocks, carry, carry_backward, decays, decays_backward

BLOCK = 16
BLOCK_SCALAR = 64  # C * C decays per head are nothing beside C * C * D


def gla_chunk(
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
    (batch, _, heads, dim), dim_v = k.shape, v.shape[-1]
    by_row = gate in ("key", "value")
    size = BLOCK if by_row else BLOCK_SCALAR
    blocks = Blocks.cut(k, cu_seqlens, size)

    (span,) = blocks.spans(sum(blocks.active))

    def cut(x: Tensor, *shape: int) -> Tensor:
        return span.gather(x).to(dtype).reshape(-1, *shape)

    group = q.shape[2] // heads
    qb = cut(q.unflatten(2, (heads, -1)), size * group, dim) * scale
    kb, vb = cut(k, size, dim), cut(v, size, dim_v)
    x = kb.shape[0]
    width = {"key": dim, "value": dim_v}.get(str(gate), 1)
    alpha = kb.new_ones(x, size, 1) if log_decay is None else cut(log_decay, size, width).exp()
    if write is not None:
        weight = cut(write, size, width)
        kb, vb = (kb, vb * weight) if gate == "value" else (kb * weight, vb)
    if initial_state is None:
        sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
        initial_state = k.new_zeros(sequences, heads, dim, dim_v)
    initial = blocks.sort(initial_state.to(dtype))

    # what the gated side weighs at later tokens, itself included where the gate has its rows
    gated = {"key": kb, "value": vb}.get(str(gate), torch.ones_like(alpha))
    since_start, since_token = _Decays.apply(alpha, gated)
    start, to_end = since_start.unsqueeze(2), since_token[:, -1]
    decay = since_start[:, -1].reshape(-1, heads, width, 1)
    if gate == "value":
        initial, update = initial.mT, to_end.mT @ kb
    else:
        update = (to_end if gate == "key" else to_end * kb).mT @ vb
    entry, final = _Carry.apply(initial, decay, update.unflatten(0, (-1, heads)), blocks.active)
    entry = entry.flatten(0, 1)

    q_per_token = qb.view(x * size, group, dim)
    if gate == "key":
        scores = q_per_token @ since_token.flatten(0, 1).mT
        outer = (qb.view(x, size, group, dim) * start).flatten(1, 2)
        o = torch.baddbmm(outer @ entry, scores.view(x, size * group, size), vb)
    elif gate == "value":
        final = final.mT
        outer = (qb @ entry.mT).unflatten(1, (size, group)) * start
        o = torch.baddbmm(outer.flatten(0, 1), (qb @ kb.mT).view(-1, group, size), since_token.flatten(0, 1))
    else:
        scores = (qb @ kb.mT).view(x, size, group, size) * since_token.mT
        outer = (qb @ entry).unflatten(1, (size, group)) * start
        o = torch.baddbmm(outer.flatten(1, 2), scores.flatten(1, 2), vb)

    out = o.new_empty(*q.shape[:2], heads, group, dim_v)
    span.scatter(o.view(x, size, group, dim_v), out)
    return out.flatten(2, 3).to(q.dtype), blocks.unsort(final) if output_final_state else None


class _Decays(torch.autograd.Function):
    @staticmethod
    def forward(ctx, alpha: Tensor, write: Tensor):  # type: ignore[override]
        since_start, since_token = decays(alpha, write)
        ctx.save_for_backward(alpha, since_start, since_token)
        return since_start, since_token

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_start: Tensor, d_token: Tensor):  # type: ignore[override]
        alpha, since_start, since_token = ctx.saved_tensors
        return decays_backward(alpha, since_start, since_token, d_start.clone(), d_token.clone())


class _Carry(torch.autograd.Function):
    @staticmethod
    def forward(ctx, initial: Tensor, decay: Tensor, update: Tensor, active: tuple[int, ...]):  # type: ignore[override]
        state = initial.clone()
        entry = carry(state, decay, update, active)
        ctx.save_for_backward(decay, entry)
        ctx.active = active
        return entry, state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_entry: Tensor, d_final: Tensor):  # type: ignore[override]
        decay, entry = ctx.saved_tensors
        d_state = d_final.clone()
        d_update = carry_backward(d_state, decay, d_entry, ctx.active)
        return d_state, (d_update * entry).sum(-1, keepdim=True), d_update, None
