"""The fast forward pass in bf16: a program walks its segment in tiles of 16 tokens with both states in registers."""

import torch
import triton
import triton.language as tl

from ...triton_chunks import LOG2E, load_rows, own_chunk, pad, power_of_two, row_offsets
from ...triton_launch import launch
from . import configs
from .common import readable
from .pieces import LOWEST, combine
from .walk import TILE, TINY, Walk, segment_length


@triton.jit
def load_state(ptr, m, WIDTH: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr, M: tl.constexpr):
    d = tl.arange(0, BLOCK)
    mask = (m < M)[:, None] & (d < WIDTH)[None, :]
    return tl.load(ptr + m[:, None] * STRIDE + d[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_operand(operands, token, valid, part, m, M: tl.constexpr, PARTS: tl.constexpr, CT: tl.constexpr):
    """[16, BM]; which parts there are tells `gates_kernel`."""
    mask = valid[:, None] & (m < M)[None, :]
    return tl.load(operands + token[:, None] * (PARTS * M) + part * M + m[None, :], mask=mask, other=0.0).to(CT)


@triton.jit
def walk_forward_kernel(
    q, k, v, visible, operands, gamma, states, o, lse, bounds, T, NS, S, H, HQ, G, P, scale_log2,
    D: tl.constexpr, V: tl.constexpr, M: tl.constexpr, BG: tl.constexpr, BM: tl.constexpr,
    BD: tl.constexpr, BV: tl.constexpr, PACKED: tl.constexpr, EMPTY: tl.constexpr, LIMITED: tl.constexpr,
    CT: tl.constexpr,
):  # fmt: skip
    """o of one (segment, piece of a key/value head) and all its query heads, and where there are several pieces log2 of
    the sum that its softmax was divided by; EMPTY: the segments start from nothing."""
    c, h, start, stop, n = own_chunk(bounds, T, NS, S, H, PACKED)
    if stop <= start:
        return
    i = tl.arange(0, TILE)
    m = tl.arange(0, BM)
    d = tl.arange(0, BD)
    e = tl.arange(0, BV)
    if EMPTY:
        state_k = tl.zeros([BM, BD], tl.float32)
        state_v = tl.zeros([BM, BV], tl.float32)
    else:
        base = states + (c.to(tl.int64) * H + h) * (M * (D + V))
        state_k = load_state(base, m, D, BD, D + V, M)
        state_v = load_state(base + D, m, V, BV, D + V, M)
    for tile in tl.range(0, (stop - start).to(tl.int32), TILE, disable_licm=True):
        first = start + tile
        token = (first + i) * (H // P) + h // P
        cell = (first + i) * H + h
        valid = (first + i) < stop
        t, row, row_valid = row_offsets(first, stop, h // P, 0, HQ, G, TILE, BG)
        _, at, _ = row_offsets(first, stop, h, 0, HQ * P, G, TILE, BG)
        qb = load_rows(q, row, row_valid, D, d, CT)
        kb = load_rows(k, token, valid, D, d, CT)
        vb = load_rows(v, token, valid, V, e, CT)
        wi = load_operand(operands, cell, valid, 1, m, M, 4, CT)
        pick = (t[:, None] == i[None, :]).to(CT)
        factor = tl.dot(pick, load_operand(operands, cell, valid, 2, m, M, 4, CT), input_precision="ieee")
        factor = tl.dot(pick, load_operand(operands, cell, valid, 3, m, M, 4, CT), factor, input_precision="ieee")
        causal = i[None, :] <= t[:, None]
        qk = tl.where(causal, tl.dot(qb, tl.trans(kb), input_precision="ieee"), 0.0).to(CT)
        s = tl.dot(qb, tl.trans((state_k * TINY).to(CT)), input_precision="ieee")
        s = tl.dot(qk, wi, s, input_precision="ieee") * (factor * scale_log2)
        if LIMITED or M < BM:
            s = tl.where(readable(visible, first, t, row_valid, m, M, LIMITED, h % P * M), s, float("-inf"))
        top = tl.max(s, 1)
        if lse is not None:  # of a piece there may be nothing to see
            top = tl.maximum(top, LOWEST)
        p = tl.exp2(s - top[:, None])
        total = tl.sum(p, 1)
        if lse is not None:
            tl.store(lse + at, top + tl.log2(total), mask=row_valid)
            total = tl.maximum(total, 1.0)
        p = (p * (factor / total[:, None])).to(CT)
        a = tl.where(causal, tl.dot(p, tl.trans(wi), input_precision="ieee"), 0.0).to(CT)
        ob = tl.dot(p, (state_v * TINY).to(CT), input_precision="ieee")
        ob = tl.dot(a, vb, ob, input_precision="ieee")
        tl.store(o + at[:, None] * V + e[None, :], ob, mask=row_valid[:, None] & (e < V)[None, :])
        decay = tl.load(gamma + (((first // TILE) + n) * H + h) * M + m, mask=m < M, other=1.0)
        we = tl.trans(load_operand(operands, cell, valid, 0, m, M, 4, CT))
        state_k = tl.dot(we, kb, state_k * decay[:, None], input_precision="ieee")
        state_v = tl.dot(we, vb, state_v * decay[:, None], input_precision="ieee")


def walk_forward(q, k, v, log_alpha, visible, scale: float, initial, final, cu_seqlens, operand=tl.bfloat16):
    """o [B, T, HQ, V]; writes `final` (pair of fp32 states, or None).

    log_alpha [B, T, H * P, M] has the slots of each head in P pieces, as the states [N, H * P, M, :] have.
    """
    B, T, HQ, D = q.shape
    (H, M), V, group = log_alpha.shape[2:], v.shape[-1], HQ // k.shape[2]
    P = H // k.shape[2]
    walk = Walk(log_alpha, P, D, V, cu_seqlens, operand, 4)
    length = segment_length(T, H * (B if cu_seqlens is None else 1), q.device, configs.FORWARD_PROGRAMS)
    segments = walk.segments(length)
    states = walk.segment_states(((walk.operands, k), (walk.operands, v)), initial, final, segments, length)
    o = torch.empty(B, T, HQ * P, V, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, T, HQ * P, dtype=torch.float32, device=q.device) if P > 1 else None
    launch(
        walk_forward_kernel, (segments.count * H, 1, 1),
        q, k, v, visible, walk.operands, walk.gamma, states, o, lse, segments.bounds, T, segments.per_sequence,
        length, H, HQ, group, P, scale * LOG2E,
        D, V, M, power_of_two(group), pad(M), pad(D), pad(V),
        segments.bounds is not None, states is None, visible is not None, operand,
        **configs.for_group(configs.FORWARD, group),
    )  # fmt: skip
    return o if lse is None else combine(o, lse, group, P)[0]
