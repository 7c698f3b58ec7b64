"""Gated linear attention in blocks of tokens, in plain torch: any device, float32 or float64.

The gate scales the rows of a state S [R, X]: R = D for a gate on the key side, R = V (the state transposed) for one on
the value side. A scalar gate, and none, need one decay per pair of tokens instead of one per pair and row.

Long sequences are taken piece by piece, each from the last one's state, so that the decays of all pairs never exist at
once. Packed documents are taken whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..blocks import Blocks, carry, carry_backward, decays, decays_backward

BLOCK = 16
BLOCK_SCALAR = 64  # C * C decays per head are nothing beside C * C * D
PIECE_BYTES = 16 << 20  # of the decays of one piece
PIECE_BYTES_GPU = 256 << 20


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
    (batch, tokens, heads, dim), dim_v = k.shape, v.shape[-1]
    size = BLOCK if gate in ("key", "value") else BLOCK_SCALAR
    width = {"key": dim, "value": dim_v}.get(str(gate), 1)
    if initial_state is None:
        sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
        initial_state = k.new_zeros(sequences, heads, dim, dim_v)
    limit = PIECE_BYTES if k.device.type == "cpu" else PIECE_BYTES_GPU
    piece = max(limit // (4 * batch * heads * size * width) // size, 1) * size
    if cu_seqlens is not None or tokens <= piece:
        o, state = _piece(q, k, v, log_decay, gate, write, scale, initial_state, cu_seqlens, size, width)
    else:
        pieces = [
            (None,) * -(-tokens // piece) if x is None else x.split(piece, 1) for x in (q, k, v, log_decay, write)
        ]
        outputs, state = [], initial_state
        for q, k, v, log_decay, write in zip(*pieces, strict=True):
            o, state = _piece(q, k, v, log_decay, gate, write, scale, state, None, size, width)
            outputs.append(o)
        o = torch.cat(outputs, 1)
    return o, state if output_final_state else None


def _piece(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    gate: str | None,
    write: Tensor | None,
    scale: float,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
    size: int,
    width: int,
) -> tuple[Tensor, Tensor]:
    dtype, heads, dim, dim_v = torch.promote_types(q.dtype, torch.float32), *k.shape[2:], v.shape[-1]
    blocks = Blocks.cut(k, cu_seqlens, size)
    (span,) = blocks.spans(sum(blocks.active))

    def cut(x: Tensor, *shape: int) -> Tensor:
        return span.gather(x).to(dtype).reshape(-1, *shape)

    group = q.shape[2] // heads
    qb = cut(q.unflatten(2, (heads, -1)), size * group, dim) * scale
    kb, vb = cut(k, size, dim), cut(v, size, dim_v)
    x = kb.shape[0]
    alpha = kb.new_ones(x, size, 1) if log_decay is None else cut(log_decay, size, width).exp()
    if write is not None:
        weight = cut(write, size, width)
        kb, vb = (kb, vb * weight) if gate == "value" else (kb * weight, vb)
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
    return out.flatten(2, 3).to(q.dtype), blocks.unsort(final)


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
