"""Gated linear attention in blocks of tokens, in plain torch: any device, float32 or float64.

The gate scales the rows of a state S [R, X]: R = D for a gate on the key side, R = V (the state transposed) for one on
the value side. A scalar gate, and none, need one decay per pair of tokens instead of one per pair and row.

Long sequences are taken piece by piece, each from the last one's state, so that the decays of all pairs never exist at
once. Packed documents are taken whole. Kept for the backward pass are the inputs and the states between pieces.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..blocks import Blocks, Span, carry, carry_backward, decays, decays_backward
from ..dispatch import without_autocast

BLOCK = 16
BLOCK_SCALAR = 64  # C * C decays per head are nothing beside C * C * D
PIECE_BYTES = 16 << 20  # of the decays of one piece
PIECE_BYTES_GPU = 256 << 20

# of q, k, v, log_decay, write and the state
Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor]


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
    if initial_state is None:
        initial_state = _zero_state(k, v, cu_seqlens)
    o, final = _Chunked.apply(q, k, v, log_decay, write, initial_state, gate, scale, cu_seqlens)
    return o, final if output_final_state else None


def gla_chunk_backward(
    do: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    gate: str | None,
    write: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Gradients:
    """The gradients of q, k, v, log_decay, write and the initial state, all in the dtype of computation.

    From the inputs alone: the states are computed a second time. For where autograd does not reach: inside an operator.
    """
    if initial_state is None:
        initial_state = _zero_state(k, v, cu_seqlens)
    pieces = _pieces(q, k, v, log_decay, write, gate, scale, cu_seqlens)
    starts = [initial_state.to(pieces[0].dtype)]
    for piece in pieces[:-1]:
        starts.append(piece.forward(starts[-1])[1])
    return _backward(pieces, starts, do, torch.zeros_like(starts[0]) if dfinal is None else dfinal)


def _zero_state(k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    sequences = k.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    return k.new_zeros(sequences, *k.shape[2:], v.shape[-1])


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, log_decay, write, initial_state, gate, scale, cu_seqlens):  # type: ignore[override]
        pieces = _pieces(q, k, v, log_decay, write, gate, scale, cu_seqlens)
        starts, outputs = [initial_state.to(pieces[0].dtype)], []
        for piece in pieces:
            o, final = piece.forward(starts[-1])
            outputs.append(o.to(q.dtype))
            starts.append(final)
        ctx.save_for_backward(q, k, v, log_decay, write, cu_seqlens, *starts[:-1])
        ctx.gate, ctx.scale = gate, scale
        return torch.cat(outputs, 1), starts[-1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_o, d_final):  # type: ignore[override]
        q, k, v, log_decay, write, cu_seqlens, *starts = ctx.saved_tensors
        with without_autocast(q.device):
            pieces = _pieces(q, k, v, log_decay, write, ctx.gate, ctx.scale, cu_seqlens)
            return *_backward(pieces, starts, d_o, d_final), None, None, None


def _pieces(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    write: Tensor | None,
    gate: str | None,
    scale: float,
    cu_seqlens: Tensor | None,
) -> list[_Piece]:
    (batch, tokens, heads, dim), dim_v = k.shape, v.shape[-1]
    size = BLOCK if gate in ("key", "value") else BLOCK_SCALAR
    width = {"key": dim, "value": dim_v}.get(str(gate), 1)
    limit = PIECE_BYTES if k.device.type == "cpu" else PIECE_BYTES_GPU
    length = max(limit // (4 * batch * heads * size * width) // size, 1) * size
    if cu_seqlens is not None:
        length = tokens
    dtype, pieces = torch.promote_types(q.dtype, torch.float32), []
    for start in range(0, tokens, length):
        here = slice(start, start + length)
        log_decay_here, write_here = (None if x is None else x[:, here] for x in (log_decay, write))
        blocks = Blocks.cut(k[:, here], cu_seqlens, size)
        tensors = q[:, here], k[:, here], v[:, here], log_decay_here, write_here
        pieces.append(_Piece(*tensors, gate, scale, blocks, width, dtype))
    return pieces


def _backward(pieces: list[_Piece], starts: list[Tensor], d_o: Tensor, d_final: Tensor) -> Gradients:
    d_state = d_final.to(pieces[0].dtype)
    length, gradients = pieces[0].k.shape[1], []
    for piece, start, d_here in reversed(list(zip(pieces, starts, d_o.split(length, 1), strict=True))):
        *found, d_state = piece.backward(start, d_here, d_state)
        gradients.append(found)
    d_q, d_k, d_v, *optional = zip(*reversed(gradients), strict=True)
    d_log_decay, d_write = (None if x[0] is None else torch.cat(x, 1) for x in optional)
    return torch.cat(d_q, 1), torch.cat(d_k, 1), torch.cat(d_v, 1), d_log_decay, d_write, d_state


class _Within(NamedTuple):
    """One piece in blocks: X = blocks * H of C tokens. Rows of q are (token, query head)."""

    q: Tensor  # [X, C * G, D], scaled
    k: Tensor  # [X, C, D], as it is written
    v: Tensor  # [X, C, V], as it is written
    alpha: Tensor  # [X, C, R]
    since_start: Tensor  # [X, C, R]
    since_token: Tensor  # [X, C, C, R], where the gate has rows with what is written there
    decay: Tensor  # [blocks, H, R, 1] of a whole block
    entry: Tensor  # [X, R, X], the state before each block
    final: Tensor  # [N, H, R, X], in the order of the blocks


class _Piece(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    write: Tensor | None
    gate: str | None
    scale: float
    blocks: Blocks
    width: int
    dtype: torch.dtype

    @property
    def span(self) -> Span:
        """All of the blocks."""
        (span,) = self.blocks.spans(sum(self.blocks.active))
        return span

    def cut(self, x: Tensor, rows: int, width: int) -> Tensor:
        """[B, T, H, ...] -> [X, rows, width]."""
        return self.span.gather(x).to(self.dtype).reshape(-1, rows, width)

    def whole(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The inverse of `cut`: [X, rows, width] -> [B, T, H or HQ, ...] = `shape`, in the dtype of computation."""
        out, size, heads = x.new_empty(shape), self.blocks.size, self.k.shape[2]
        if shape[2] == heads:
            self.span.scatter(x.reshape(-1, size, *shape[3:]), out)
        else:
            self.span.scatter(x.unflatten(1, (size, -1)), out.unflatten(2, (heads, -1)))
        return out

    def within(self, start: Tensor) -> _Within:
        size, heads, group = self.blocks.size, self.k.shape[2], self.q.shape[2] // self.k.shape[2]
        q = self.cut(self.q.unflatten(2, (heads, group)), size * group, self.q.shape[-1]) * self.scale
        k, v = (self.cut(x, size, x.shape[-1]) for x in (self.k, self.v))
        if self.write is not None:
            weight = self.cut(self.write, size, self.width)
            k, v = (k, v * weight) if self.gate == "value" else (k * weight, v)
        x, state = k.shape[0], self.blocks.sort(start)
        alpha = k.new_ones(x, size, 1) if self.log_decay is None else self.cut(self.log_decay, size, self.width).exp()
        written = {"key": k, "value": v}.get(str(self.gate), torch.ones_like(alpha))
        since_start, since_token = decays(alpha, written)
        decay = since_start[:, -1].reshape(-1, heads, self.width, 1)
        to_end = since_token[:, -1]
        if self.gate == "value":
            update = to_end.mT @ k
        else:
            update = (to_end if self.gate == "key" else to_end * k).mT @ v
        state = (state.mT if self.gate == "value" else state).clone()
        entry = carry(state, decay, update.unflatten(0, (-1, heads)), self.span.active).flatten(0, 1)
        return _Within(q, k, v, alpha, since_start, since_token, decay, entry, state)

    def forward(self, start: Tensor) -> tuple[Tensor, Tensor]:
        """o [B, T, HQ, V] and the state at the end, from that at the start."""
        q, k, v, alpha, since_start, since_token, _, entry, final = self.within(start)
        x, size, _ = alpha.shape
        since, tokens = since_start[:, :, None], since_token.flatten(0, 1)
        if self.gate == "key":
            outer = (q.view(x, size, -1, self.width) * since).flatten(1, 2) @ entry
            scores = q.view(x * size, -1, self.width) @ tokens.mT
            o = outer.baddbmm_(scores.view(x, -1, size), v)
        elif self.gate == "value":
            o = ((q @ entry.mT).unflatten(1, (size, -1)) * since).flatten(0, 1)
            o = o.baddbmm_((q @ k.mT).view(x * size, -1, size), tokens)
        else:
            scores = (q @ k.mT).view(x, size, -1, size) * since_token.mT
            o = ((q @ entry).unflatten(1, (size, -1)) * since).flatten(1, 2)
            o = o.baddbmm_(scores.flatten(1, 2), v)
        final = self.blocks.unsort(final.mT.contiguous() if self.gate == "value" else final)
        return self.whole(o.view(x, -1, v.shape[-1]), (*self.q.shape[:3], v.shape[-1])), final

    def backward(self, start: Tensor, d_o: Tensor, d_final: Tensor) -> Gradients:
        """The gradients of q, k, v, log_decay, write and the state at the start, given that of the state at the end."""
        q, k, v, alpha, since_start, since_token, decay, entry, _ = self.within(start)
        (x, size, _), heads = alpha.shape, self.k.shape[2]
        since, tokens = since_start[:, :, None], since_token.flatten(0, 1)
        do = self.cut(d_o.unflatten(2, (heads, -1)), q.shape[1], v.shape[-1])
        do_tokens, q_tokens = (z.view(x * size, -1, z.shape[-1]) for z in (do, q))

        if self.gate == "key":
            scores, d_scores = (q_tokens @ tokens.mT).view(x, -1, size), do @ v.mT
            rows, d_outer = q.view(x, size, -1, self.width), (do @ entry.mT).view(x, size, -1, self.width)
            d_entry = (rows * since).flatten(1, 2).mT @ do
            d_q = (d_outer * since).flatten(0, 1).baddbmm_(d_scores.view(x * size, -1, size), tokens)
            d_start, d_v = (d_outer * rows).sum(2), scores.mT @ do
            d_token = (d_scores.view(x * size, -1, size).mT @ q_tokens).view_as(since_token)
        elif self.gate == "value":
            scores = (q @ k.mT).view(x * size, -1, size)
            d_scores = (do_tokens @ tokens.mT).view(x, -1, size)
            seen, d_rows = (q @ entry.mT).view(x, size, -1, self.width), do.view(x, size, -1, self.width)
            d_seen = (d_rows * since).flatten(1, 2)
            d_start, d_entry = (d_rows * seen).sum(2), d_seen.mT @ q
            d_q, d_k = torch.baddbmm(d_seen @ entry, d_scores, k), d_scores.mT @ q
            d_token = (scores.mT @ do_tokens).view_as(since_token)
        else:
            products, d_scores = (y.view(x, size, -1, size) for y in (q @ k.mT, do @ v.mT))
            d_products = (d_scores * since_token.mT).flatten(1, 2)
            d_rows = do.view(x, size, -1, v.shape[-1])
            d_seen = (d_rows * since).flatten(1, 2)
            d_entry = q.mT @ d_seen
            d_q, d_k = torch.baddbmm(d_seen @ entry.mT, d_products, k), d_products.mT @ q
            d_v = (products * since_token.mT).flatten(1, 2).mT @ do
            if self.gate == "scalar":
                d_start = (d_rows * (q @ entry).view_as(d_rows)).sum((2, 3))[..., None]
                d_token = (d_scores * products).sum(2)[..., None]

        d_state = self.blocks.sort(d_final)
        d_state = (d_state.mT if self.gate == "value" else d_state).clone()
        d_update = carry_backward(d_state, decay, d_entry.unflatten(0, (-1, heads)), self.span.active).flatten(0, 1)
        to_end = since_token[:, -1]
        if self.gate == "key":
            d_token[:, -1] += v @ d_update.mT
            d_v.baddbmm_(to_end, d_update)
        elif self.gate == "value":
            d_token[:, -1] += k @ d_update.mT
            d_k.baddbmm_(to_end, d_update)
        else:
            d_written = v @ d_update.mT
            d_v.baddbmm_(to_end * k, d_update)
            d_k.addcmul_(d_written, to_end)
            if self.gate == "scalar":
                d_token[:, -1] += (d_written * k).sum(-1, keepdim=True)
        d_alpha = None
        if self.gate is not None:
            through = (d_update * entry).sum(-1)
            d_start[:, -1] += through.sum(-1, keepdim=True) if self.gate == "scalar" else through
            d_alpha, d_written = decays_backward(alpha, since_start, since_token, d_start, d_token)
            d_k = d_written if self.gate == "key" else d_k
            d_v = d_written if self.gate == "value" else d_v

        d_log_decay = d_write = None
        if d_alpha is not None and self.log_decay is not None:
            d_log_decay = self.whole(d_alpha.mul_(alpha), self.log_decay.shape)
        if self.write is not None:
            weight = self.cut(self.write, size, self.width)
            if self.gate == "value":
                d_weight, d_v = d_v * self.cut(self.v, size, self.width), d_v * weight
            else:
                d_weight, d_k = d_k * self.cut(self.k, size, k.shape[-1]), d_k * weight
            if self.gate not in ("key", "value"):
                d_weight = d_weight.sum(-1)
            d_write = self.whole(d_weight, self.write.shape)
        d_q = self.whole(d_q.view_as(q) * self.scale, self.q.shape)
        d_state = self.blocks.unsort(d_state.mT if self.gate == "value" else d_state)
        return d_q, self.whole(d_k, self.k.shape), self.whole(d_v, self.v.shape), d_log_decay, d_write, d_state
