"""The forward pass of one chunk: scores over slots, softmax in registers, output; all heads of a group in one tile."""

import torch
import triton
import triton.language as tl

from ...triton_chunks import (
    LOG2E,
    choose_numerics,
    dot,
    find_chunks,
    load_rows,
    own_chunk,
    pairs_at,
    row_offsets,
)
from ...triton_launch import launch
from .common import choose_blocks, readable
from .decays import chunk_decays, chunk_tables, load_prefix, load_suffix, load_weight
from .pieces import LOWEST, combine
from .states import chunk_states


@triton.jit
def read_slots(
    qk, inter, t, i, row_valid, valid, m, decays, H,
    M: tl.constexpr, LOG_C: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Value-side gated attention of a chunk: sum_i qk[t, i] w[i, m] decay(i..t)[m] plus inter[t, m] decay(start..t).

    qk [rows, C] are products with the chunk's tokens, inter [rows, BM] products with the state at its start.
    """
    w = load_weight(decays, i, valid, m, H, M, LOG_C)
    s = inter * load_prefix(decays, LOG_C, t, row_valid, m, H, M, LOG_C)
    s += dot(tl.where(t[:, None] == i[None, :], qk, 0.0), w, CT, PREC)
    for level in range(LOG_C):
        we = w * load_suffix(decays, level, i, valid, m, H, M, LOG_C)
        part = dot(tl.where(pairs_at(t, i, level), qk, 0.0), we, CT, PREC)
        s += part * load_prefix(decays, level, t, row_valid, m, H, M, LOG_C)
    return s


@triton.jit
def read_both(
    qk, qs, ov, os, t, i, row_valid, valid, m, decays, H,
    M: tl.constexpr, LOG_C: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """`read_slots` of (qk, qs) and of (ov, os)."""
    w = load_weight(decays, i, valid, m, H, M, LOG_C)
    decay = load_prefix(decays, LOG_C, t, row_valid, m, H, M, LOG_C)
    same = t[:, None] == i[None, :]
    s = qs * decay + dot(tl.where(same, qk, 0.0), w, CT, PREC)
    dp = os * decay + dot(tl.where(same, ov, 0.0), w, CT, PREC)
    for level in range(LOG_C):
        pairs = pairs_at(t, i, level)
        we = w * load_suffix(decays, level, i, valid, m, H, M, LOG_C)
        decay = load_prefix(decays, level, t, row_valid, m, H, M, LOG_C)
        s += dot(tl.where(pairs, qk, 0.0), we, CT, PREC) * decay
        dp += dot(tl.where(pairs, ov, 0.0), we, CT, PREC) * decay
    return s, dp


@triton.jit
def write_slots(
    p, t, i, row_valid, valid, m, decays, H,
    M: tl.constexpr, LOG_C: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Key-side gated attention of a chunk: [rows, C] of sum_m p[t, m] w[i, m] decay(i -> t)[m] for i <= t, else 0."""
    w = load_weight(decays, i, valid, m, H, M, LOG_C)
    a = tl.where(t[:, None] == i[None, :], dot(p, tl.trans(w.to(CT)), CT, PREC), 0.0)
    for level in range(LOG_C):
        we = w * load_suffix(decays, level, i, valid, m, H, M, LOG_C)
        pd = p * load_prefix(decays, level, t, row_valid, m, H, M, LOG_C)
        a += tl.where(pairs_at(t, i, level), dot(pd, tl.trans(we.to(CT)), CT, PREC), 0.0)
    return a


@triton.jit
def write_both(
    p, ds, t, i, row_valid, valid, m, decays, H,
    M: tl.constexpr, LOG_C: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """`write_slots` of p and of ds."""
    w = load_weight(decays, i, valid, m, H, M, LOG_C)
    same = t[:, None] == i[None, :]
    wt = tl.trans(w.to(CT))
    a = tl.where(same, dot(p, wt, CT, PREC), 0.0)
    da = tl.where(same, dot(ds, wt, CT, PREC), 0.0)
    for level in range(LOG_C):
        pairs = pairs_at(t, i, level)
        we = tl.trans((w * load_suffix(decays, level, i, valid, m, H, M, LOG_C)).to(CT))
        decay = load_prefix(decays, level, t, row_valid, m, H, M, LOG_C)
        a += tl.where(pairs, dot(p * decay, we, CT, PREC), 0.0)
        da += tl.where(pairs, dot(ds * decay, we, CT, PREC), 0.0)
    return a, da


@triton.jit
def softmax2(s, seen):
    """Softmax over the slots in `seen` of scores in log2 units."""
    s = tl.where(seen, s, float("-inf"))
    p = tl.exp2(s - tl.max(s, 1)[:, None])
    return p * (1.0 / tl.sum(p, 1))[:, None]


@triton.jit
def piece_softmax2(s, seen):
    """The same over one of several pieces, 0 where nothing of it is seen, and log2 of the sum of 2^score."""
    s = tl.where(seen, s, float("-inf"))
    top = tl.maximum(tl.max(s, 1), LOWEST)
    p = tl.exp2(s - top[:, None])
    total = tl.sum(p, 1)
    return p * (1.0 / tl.maximum(total, 1.0))[:, None], top + tl.log2(total)


@triton.jit
def products(
    x, y, state, row, row_valid, token, token_valid, m,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, M: tl.constexpr, STRIDE: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """x [rows, WIDTH] times y [C, WIDTH] of the chunk's tokens, and times the state [M, WIDTH] of row stride STRIDE."""
    intra = tl.zeros([R, C], tl.float32)
    inter = tl.zeros([R, BM], tl.float32)
    for d0 in range(0, WIDTH, BLOCK):
        d = d0 + tl.arange(0, BLOCK)
        xb = load_rows(x, row, row_valid, WIDTH, d, CT)
        yb = load_rows(y, token, token_valid, WIDTH, d, CT)
        sb = tl.load(state + m[:, None] * STRIDE + d[None, :], mask=(m < M)[:, None] & (d < WIDTH)[None, :], other=0.0)
        intra += dot(xb, tl.trans(yb), CT, PREC)
        inter += dot(xb, tl.trans(sb.to(CT)), CT, PREC)
    return intra, inter


@triton.jit
def forward_kernel(
    q, k, v, decays, visible, states, o, lse, bounds, T, NC, H, HQ, G, P, scale_log2,
    D: tl.constexpr, V: tl.constexpr, M: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr,
    BG: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    PACKED: tl.constexpr, LIMITED: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """o of one (chunk, piece of a key/value head, tile of its query heads), and where there are several pieces log2 of
    the sum that its softmax was divided by."""
    c, h, start, stop, _ = own_chunk(bounds, T, NC, C, H, PACKED)
    if stop <= start:
        return
    i = tl.arange(0, C)
    m = tl.arange(0, BM)
    token = (start + i) * (H // P) + h // P
    valid = (start + i) < stop
    t, row, row_valid = row_offsets(start, stop, h // P, tl.program_id(1) * BG, HQ, G, C, BG)
    _, at, _ = row_offsets(start, stop, h, tl.program_id(1) * BG, HQ * P, G, C, BG)
    decays = chunk_decays(decays, start, h, H, M, LOG_C)
    state = states + (c.to(tl.int64) * H + h) * (M * (D + V))
    qk, qs = products(
        q, k, state, row, row_valid, token, valid, m, D, BD, M, D + V, C * BG, C, BM, CT, PREC
    )  # fmt: skip
    s = read_slots(qk, qs, t, i, row_valid, valid, m, decays, H, M, LOG_C, CT, PREC)
    seen = readable(visible, start, t, row_valid, m, M, LIMITED, h % P * M)
    if lse is None:
        p = softmax2(s * scale_log2, seen)
    else:
        p, sums = piece_softmax2(s * scale_log2, seen)
        tl.store(lse + at, sums, mask=row_valid)
    a = write_slots(p, t, i, row_valid, valid, m, decays, H, M, LOG_C, CT, PREC).to(CT)
    pd = (p * load_prefix(decays, LOG_C, t, row_valid, m, H, M, LOG_C)).to(CT)
    for d0 in range(0, V, BV):
        d = d0 + tl.arange(0, BV)
        vb = load_rows(v, token, valid, V, d, CT)
        sb = tl.load(state + D + m[:, None] * (D + V) + d[None, :], mask=(m < M)[:, None] & (d < V)[None, :], other=0.0)
        ob = dot(a, vb, CT, PREC) + dot(pd, sb, CT, PREC)
        tl.store(o + at[:, None] * V + d[None, :], ob, mask=row_valid[:, None] & (d < V)[None, :])


def forward(q, k, v, log_alpha, visible, scale: float, initial, final, cu_seqlens):
    """o [B, T, HQ, V]; writes `final` (pair of fp32 states, or None).

    log_alpha [B, T, H * P, M] has the slots of each head in P pieces, as the states [N, H * P, M, :] have.
    """
    B, T, HQ, D = q.shape
    (H, M), V, group = log_alpha.shape[2:], v.shape[-1], HQ // k.shape[2]
    P = H // k.shape[2]
    numerics = choose_numerics(q.dtype)
    blocks = choose_blocks(group, D, V, M, numerics.store.itemsize)
    chunks = find_chunks(B, T, blocks.chunk, cu_seqlens)
    decays, gamma = chunk_tables(log_alpha, chunks, blocks, numerics)
    states = chunk_states(k, v, decays, gamma, initial, final, chunks, blocks, numerics)
    o = torch.empty(B, T, HQ * P, V, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, T, HQ * P, dtype=torch.float32, device=q.device) if P > 1 else None
    launch(
        forward_kernel, (chunks.count * H, blocks.group_tiles, 1),
        q, k, v, decays, visible, states, o, lse, chunks.bounds, T, chunks.per_sequence, H, HQ, group, P,
        scale * LOG2E, D, V, M, blocks.chunk, blocks.chunk.bit_length() - 1, blocks.group, blocks.slots, blocks.key,
        blocks.value,
        PACKED=chunks.bounds is not None, LIMITED=visible is not None, CT=numerics.operand,
        PREC=numerics.precision, num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    return o if lse is None else combine(o, lse, group, P)[0]
