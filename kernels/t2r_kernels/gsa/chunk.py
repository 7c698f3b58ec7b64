"""Gated Slot Attention in blocks of tokens, in plain torch: any device, float32 or float64.

With w = 1 - alpha and E[t, i] = alpha_{i+1} ... alpha_t (per slot), a block that starts with the states K, V gives

    s_t = E[t, start] * (K q_t) + sum_{i <= t} E[t, i] w_i (k_i . q_t)         value-side gated linear attention
    p_t = softmax(scale * s_t)
    o_t = V^T (E[t, start] * p_t) + sum_{i <= t} (sum_m p_t E[t, i] w_i) v_i    key-side gated linear attention

The weights E[t, i] w_i are computed once and serve both sums and the update of the states, which are kept as one matrix
[M, D + V]. The query heads of a group are rows of the matrices they multiply with; k, v and the states are never
repeated. Forward and backward work on a span of blocks at a time, so that intermediates stay in a CPU's cache. Kept for
the backward are the inputs, the states between spans and, on a CPU, where time is scarcer than memory, the scores; the
backward computes the rest again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..blocks import Blocks, Span, carry, carry_backward, decays, decays_backward
from ..dispatch import without_autocast
from .naive import State, zero_state

SPAN_BYTES = 3 << 20  # of what one span works on: what a CPU's cache holds
SPAN_BYTES_GPU = 256 << 20  # few launches, bounded memory


def gsa_chunk(
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
    prepared = _prepare(q, k, v, log_alpha, initial_state, cu_seqlens)
    o, final = _Chunked.apply(*prepared[:4], visible, scale, prepared[4])
    o, dim_k = o.flatten(2, 3).to(q.dtype), k.shape[-1]
    return o, (final[..., :dim_k].contiguous(), final[..., dim_k:].contiguous()) if output_final_state else None


def gsa_chunk_backward(
    do: Tensor,
    dfinal: State | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    scale: float,
    initial_state: State | None,
    cu_seqlens: Tensor | None,
    visible: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """dq, dk, dv in their dtypes; dlog_alpha and the two gradients of the initial states in the dtype of computation.

    From the inputs alone: the forward pass runs a second time. For where autograd does not reach: inside an operator.
    """
    q_group, kv, log_alpha, state, blocks = _prepare(q, k, v, log_alpha, initial_state, cu_seqlens)
    ctx = _Context()
    _, final = _Chunked.forward(ctx, q_group, kv, log_alpha, state, visible, scale, blocks)
    d_final = torch.zeros_like(final) if dfinal is None else torch.cat([x.to(final.dtype) for x in dfinal], -1)
    d_o = do.unflatten(2, (k.shape[2], -1)).to(kv.dtype)
    d_q, d_kv, d_log_alpha, d_state, *_ = _Chunked.backward(ctx, d_o, d_final)
    (d_k, d_v), (d_state_k, d_state_v) = (x.split([k.shape[-1], v.shape[-1]], -1) for x in (d_kv, d_state))
    d_q, d_k, d_v = d_q.flatten(2, 3).to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype)
    return d_q, d_k.contiguous(), d_v.contiguous(), d_log_alpha, d_state_k.contiguous(), d_state_v.contiguous()


class _Context:
    """What `_Chunked` asks of autograd's context."""

    needs_input_grad = (True,)
    scale: float
    blocks: Blocks
    kept: list
    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor) -> None:
        self.saved_tensors = tensors


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, initial_state: State | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Blocks]:
    """q [B, T, H, G, D], kv [B, T, H, D + V], log_alpha, state [N, H, M, D + V] in the dtype of computation; blocks."""
    dtype, heads = torch.promote_types(q.dtype, torch.float32), k.shape[2]
    # per token, a block of C works on C * M weights within it and (D + V) * M / C numbers of state between blocks
    blocks = Blocks.cut(k, cu_seqlens, 8 if k.shape[-1] + v.shape[-1] <= 128 else 16)
    if initial_state is None:
        initial_state = zero_state(k, v, log_alpha, k.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1)
    state = torch.cat([s.to(dtype) for s in initial_state], -1)
    kv = torch.cat([k.to(dtype), v.to(dtype)], -1)
    return q.unflatten(2, (heads, -1)).to(dtype), kv, log_alpha.to(dtype), state, blocks


def _spans(blocks: Blocks, q: Tensor, kv: Tensor, log_alpha: Tensor) -> list[tuple[Span, Tensor]]:
    """The spans, each with the same memory for its weights [X, C, C, M], zero where `decays` asks for it."""
    size, group, (heads, slots) = blocks.size, q.shape[3], log_alpha.shape[-2:]
    per_block = heads * slots * (size * size + kv.shape[-1] + size * group) * q.element_size()
    spans = list(blocks.spans((SPAN_BYTES if q.device.type == "cpu" else SPAN_BYTES_GPU) // per_block))
    weights = q.new_zeros(max(span.stop - span.start for span in spans) * heads, size, size, slots)
    return [(span, weights[: (span.stop - span.start) * heads]) for span in spans]


class _Scores(NamedTuple):
    """The scores of one span; X = blocks * H, rows are tokens * query heads."""

    seen: Tensor  # [X, C * G, M], of the states
    inner: Tensor  # [X * C, G, C], of the tokens
    p: Tensor  # [X * C, G, M], after the softmax


class _Within(NamedTuple):
    """What the forward of one span computes and its backward needs."""

    alpha: Tensor  # [X, C, M]
    since_start: Tensor  # [X, C, M]
    since_token: Tensor  # [X, C, C, M]
    entry: Tensor  # [X, M, D + V]
    scores: _Scores


def _within(
    span: Span,
    weights: Tensor,
    q: Tensor,
    kv: Tensor,
    log_alpha: Tensor,
    visible: Tensor | None,
    state: Tensor,
    kept: _Scores | None,
) -> _Within:
    """q [X, C * G, D], scaled, kv [X, C, D + V]; log_alpha, visible of all spans; `state` [N, H, M, D + V] advances."""
    log_alpha = span.gather(log_alpha)
    x, size, slots = log_alpha.shape
    heads, dim_k = state.shape[1], q.shape[-1]
    alpha = log_alpha.exp()
    since_start, since_token = decays(alpha, torch.expm1(log_alpha).neg_(), out=weights)
    update = (since_token[:, -1].mT @ kv).unflatten(0, (-1, heads))
    entry = carry(state, since_start[:, -1].reshape(-1, heads, slots, 1), update, span.active).flatten(0, 1)
    if kept is not None:
        return _Within(alpha, since_start, since_token, entry, kept)
    seen = q @ entry[..., :dim_k].mT
    inner = (q @ kv[..., :dim_k].mT).view(x * size, -1, size)
    scores = (seen.view(x, size, -1, slots) * since_start[:, :, None]).view(x * size, -1, slots)
    scores.baddbmm_(inner, since_token.flatten(0, 1))
    if visible is not None:
        first_hidden = span.gather(visible[:, :, None].expand(-1, -1, heads)).clamp(min=1).view(x * size, 1, 1)
        scores.masked_fill_(torch.arange(slots, device=scores.device) >= first_hidden, -torch.inf)
    return _Within(alpha, since_start, since_token, entry, _Scores(seen, inner, scores.softmax(-1)))


def _output(within: _Within, v: Tensor) -> Tensor:
    """[X, C * G, V] of v [X, C, V]."""
    x, size, slots = within.alpha.shape
    p = within.scores.p
    outer = (p.view(x, size, -1, slots) * within.since_start[:, :, None]).view(x, -1, slots)
    inner = (p @ within.since_token.flatten(0, 1).mT).view(x, -1, size)
    return torch.baddbmm(outer @ within.entry[..., -v.shape[-1] :], inner, v)


def _backward(
    span: Span, within: _Within, q: Tensor, kv: Tensor, d_o: Tensor, d_state: Tensor, d_token: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """d (scaled) q, d kv, d log_alpha of one span; `d_state` goes from its end to its start; `d_token` is memory.

    Tensors that end in _rows are [X, C, G, M], views of others.
    """
    alpha, since_start, since_token, entry, (seen, inner, p) = within
    (x, size, slots), dim_k, heads = alpha.shape, q.shape[-1], d_state.shape[1]
    (k, v), (entry_k, entry_v) = (y.split([dim_k, y.shape[-1] - dim_k], -1) for y in (kv, entry))
    since, weights, p_rows = since_start[:, :, None], since_token.flatten(0, 1), p.view(x, size, -1, slots)

    d_inner_p = (d_o @ v.mT).view(x * size, -1, size)
    d_outer_rows = (d_o @ entry_v.mT).view_as(p_rows)
    d_p = (d_outer_rows * since).view_as(p).baddbmm_(d_inner_p, weights)
    d_s = torch._softmax_backward_data(d_p, p, -1, p.dtype)
    d_s_rows = d_s.view_as(p_rows)
    d_seen, outer = ((y * since).view(x, -1, slots) for y in (d_s_rows, p_rows))
    d_inner, inner_p = ((y @ weights.mT).view(x, -1, size) for y in (d_s, p))

    decay = since_start[:, -1].reshape(-1, heads, slots, 1)
    d_entry = torch.cat([d_seen.mT @ q, outer.mT @ d_o], -1).unflatten(0, (-1, heads))
    d_update = carry_backward(d_state, decay, d_entry, span.active).flatten(0, 1)

    d_q = torch.baddbmm(d_seen @ entry_k, d_inner, k)
    d_kv = torch.cat([d_inner.mT @ q, inner_p.mT @ d_o], -1).baddbmm_(since_token[:, -1], d_update)

    torch.bmm(inner.mT, d_s, out=d_token.flatten(0, 1)).baddbmm_(d_inner_p.mT, p)
    d_token[:, -1] += kv @ d_update.mT
    d_start = d_s_rows.mul_(seen.view_as(p_rows)).addcmul_(d_outer_rows, p_rows).sum(2)
    d_start[:, -1] += (d_update * entry).sum(-1)
    d_alpha, d_write = decays_backward(alpha, since_start, since_token, d_start, d_token)
    return d_q, d_kv, d_alpha.sub_(d_write).mul_(alpha)  # write = 1 - alpha


class _Chunked(torch.autograd.Function):
    """q [B, T, H, G, D], kv [B, T, H, D + V], log_alpha [B, T, H, M], state [N, H, M, D + V] -> o, final state.

    Inference mode saves a tenth of the time: hundreds of views per span need no autograd metadata.
    """

    @staticmethod
    def forward(ctx, q, kv, log_alpha, state, visible, scale, blocks):  # type: ignore[override]
        o = q.new_empty(*q.shape[:4], kv.shape[-1] - q.shape[-1])
        state, spans = blocks.sort(state).clone(), _spans(blocks, q, kv, log_alpha)
        starts, kept = state.new_empty(len(spans), *state.shape), []
        keep = any(ctx.needs_input_grad) and q.device.type == "cpu"
        with torch.inference_mode():
            for start, (span, weights) in zip(starts, spans, strict=True):
                start.copy_(state)
                q_span, kv_span = span.gather(q).flatten(1, 2) * scale, span.gather(kv)
                within = _within(span, weights, q_span, kv_span, log_alpha, visible, state, None)
                span.scatter(_output(within, kv_span[..., q.shape[-1] :]).unflatten(1, (blocks.size, -1)), o)
                kept.append(within.scores if keep else None)
        ctx.save_for_backward(q, kv, log_alpha, visible, starts)
        ctx.scale, ctx.blocks, ctx.kept = scale, blocks, kept
        return o, blocks.unsort(state)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_o, d_final):  # type: ignore[override]
        q, kv, log_alpha, visible, starts = ctx.saved_tensors
        blocks, scale, spans = ctx.blocks, ctx.scale, _spans(ctx.blocks, q, kv, log_alpha)
        d_state = blocks.sort(d_final).clone()
        d_q, d_kv, d_log_alpha = torch.empty_like(q), torch.empty_like(kv), torch.empty_like(log_alpha)
        d_weights = torch.empty_like(max((weights for _, weights in spans), key=len))
        with torch.inference_mode(), without_autocast(q.device):
            for start, kept, (span, weights) in reversed(list(zip(starts, ctx.kept, spans, strict=True))):
                q_span, kv_span = span.gather(q).flatten(1, 2) * scale, span.gather(kv)
                # a copy of the state advances: a graph that is kept may be walked again
                within = _within(span, weights, q_span, kv_span, log_alpha, visible, start.clone(), kept)
                d_o_span = span.gather(d_o).flatten(1, 2)
                d_q_span, d_kv_span, d_log_alpha_span = _backward(
                    span, within, q_span, kv_span, d_o_span, d_state, d_weights[: len(weights)]
                )
                span.scatter(d_q_span.mul_(scale).unflatten(1, (blocks.size, -1)), d_q)
                span.scatter(d_kv_span, d_kv)
                span.scatter(d_log_alpha_span, d_log_alpha)
        return d_q, d_kv, d_log_alpha, blocks.unsort(d_state), None, None, None
