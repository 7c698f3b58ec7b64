"""The gradient of log_alpha of one chunk; the derivation is in `backward.py`."""

import triton
import triton.language as tl

from ...triton_chunks import chunk_range, dot, load_rows, masked_sum, pairs_at, row_offsets, split, suffix_decay
from .common import load_log2_alpha, write_weight
from .forward import products


@triton.jit
def state_products(
    k, v, state, dstate, token, valid, m,
    D: tl.constexpr, V: tl.constexpr, M: tl.constexpr, C: tl.constexpr, BM: tl.constexpr,
    BD: tl.constexpr, BV: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Each token's k and v against the gradients of the states at the chunk's end [C, BM], and those gradients against
    the states at its start, slot by slot [BM]."""
    reads = tl.zeros([C, BM], tl.float32)
    across = tl.zeros([BM], tl.float32)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        cell = m[:, None] * (D + V) + d[None, :]
        mask = (m < M)[:, None] & (d < D)[None, :]
        db = tl.load(dstate + cell, mask=mask, other=0.0)
        across += tl.sum(db.to(tl.float32) * tl.load(state + cell, mask=mask, other=0.0).to(tl.float32), 1)
        reads += dot(load_rows(k, token, valid, D, d, CT), tl.trans(db.to(CT)), CT, PREC)
    for d0 in range(0, V, BV):
        d = d0 + tl.arange(0, BV)
        cell = m[:, None] * (D + V) + D + d[None, :]
        mask = (m < M)[:, None] & (d < V)[None, :]
        db = tl.load(dstate + cell, mask=mask, other=0.0)
        across += tl.sum(db.to(tl.float32) * tl.load(state + cell, mask=mask, other=0.0).to(tl.float32), 1)
        reads += dot(load_rows(v, token, valid, V, d, CT), tl.trans(db.to(CT)), CT, PREC)
    return reads, across


@triton.jit
def level_flow(
    qk, ov, ds, p, t, i, w, high, low, level,
    CT: tl.constexpr, SPLIT: tl.constexpr, PREC: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Pairs of one level of the tree: what crosses each token, and the gradient of each write weight, both [C, BM].

    A read crosses its (right) block up to itself, a write the rest of its (left) block.
    """
    pairs = pairs_at(t, i, level)
    block = (t >> level)[:, None] == (i >> level)[None, :]
    decay = tl.exp2(masked_sum(block & (i[None, :] <= t[:, None]), high, low, SPLIT, EXACT))
    qk_l = tl.where(pairs, qk, 0.0).to(CT)
    ov_l = tl.where(pairs, ov, 0.0).to(CT)
    dsd = ds * decay
    pd = p * decay
    suffix = suffix_decay(i, high, low, level, SPLIT, EXACT)
    we = (w * suffix).to(CT)
    read = dsd * dot(qk_l, we, CT, PREC) + pd * dot(ov_l, we, CT, PREC)
    flow = dot(tl.where(tl.trans(block) & (t[None, :] >= i[:, None]), 1.0, 0.0), read, CT, PREC)
    written = suffix * (dot(tl.trans(qk_l), dsd, CT, PREC) + dot(tl.trans(ov_l), pd, CT, PREC))
    beside = ((i >> level)[:, None] == (i >> level)[None, :]) & (i[None, :] < i[:, None])
    flow += dot(tl.where(beside, 1.0, 0.0), w * written, CT, PREC)
    return flow, written


@triton.jit
def gate_kernel(
    q, k, v, log_alpha, do, p_in, ds_in, states, dstates, gamma, dlog_alpha, bounds, T, NC, H, HQ, G, P,
    D: tl.constexpr, V: tl.constexpr, M: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr,
    BG: tl.constexpr, GROUP_TILES: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    PACKED: tl.constexpr, CT: tl.constexpr, SPLIT: tl.constexpr, PREC: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """dlog_alpha of one (chunk, piece)."""
    pid = tl.program_id(0)
    c = pid // H
    h = pid - c * H
    start, stop, _n = chunk_range(bounds, c, T, NC, C, PACKED)
    if stop <= start:
        return
    i = tl.arange(0, C)
    m = tl.arange(0, BM)
    token = (start + i) * (H // P) + h // P
    valid = (start + i) < stop
    x = load_log2_alpha(log_alpha, start, stop, h, H, M, C, BM)
    high, low = split(x, SPLIT)
    w = write_weight(x)
    where = c.to(tl.int64) * H + h
    state = states + where * (M * (D + V))
    dstate = dstates + where * (M * (D + V))

    # Writes in this chunk read after it, and writes before it read after it.
    reads, across = state_products(k, v, state, dstate, token, valid, m, D, V, M, C, BM, BD, BV, CT, PREC)
    dw = reads * suffix_decay(i, high, low, LOG_C, SPLIT, EXACT)
    earlier = i[None, :] < i[:, None]
    flow = dot(tl.where(earlier, 1.0, 0.0), w * dw, CT, PREC)
    flow += (tl.load(gamma + where * M + m, mask=m < M, other=0.0) * across)[None, :]

    for tile in range(GROUP_TILES):
        t, row, row_valid = row_offsets(start, stop, h // P, tile * BG, HQ, G, C, BG)
        _, at, _ = row_offsets(start, stop, h, tile * BG, HQ * P, G, C, BG)
        slot = at[:, None] * M + m[None, :]
        slot_mask = row_valid[:, None] & (m < M)[None, :]
        p = tl.load(p_in + slot, mask=slot_mask, other=0.0)
        ds = tl.load(ds_in + slot, mask=slot_mask, other=0.0)
        qk, qs = products(
            q, k, state, row, row_valid, token, valid, m, D, BD, M, D + V, C * BG, C, BM, CT, PREC
        )  # fmt: skip
        ov, os = products(
            do, v, state + D, row, row_valid, token, valid, m, V, BV, M, D + V, C * BG, C, BM, CT, PREC
        )  # fmt: skip
        # Writes before this chunk read in it at token t' cross every t <= t'.
        later = t[None, :] >= i[:, None]
        prefix = tl.exp2(masked_sum(i[None, :] <= t[:, None], high, low, SPLIT, EXACT))
        flow += dot(tl.where(later, 1.0, 0.0), (ds * qs + p * os) * prefix, CT, PREC)
        same = t[:, None] == i[None, :]
        dw += dot(tl.trans(tl.where(same, qk, 0.0).to(CT)), ds, CT, PREC)
        dw += dot(tl.trans(tl.where(same, ov, 0.0).to(CT)), p, CT, PREC)
        for level in tl.static_range(LOG_C):
            crossing, written = level_flow(qk, ov, ds, p, t, i, w, high, low, level, CT, SPLIT, PREC, EXACT)
            flow += crossing
            dw += written
    grad = flow - tl.exp2(x) * dw
    cell = (start + i) * H + h
    tl.store(dlog_alpha + cell[:, None] * M + m[None, :], grad, mask=valid[:, None] & (m < M)[None, :])
