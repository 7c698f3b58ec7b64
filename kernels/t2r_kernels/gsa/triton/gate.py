"""The gradient of log_alpha of one chunk; the derivation is in `backward.py`."""

import triton
import triton.language as tl

from ...triton_chunks import dot, load_rows, masked_dot, own_chunk, pairs_at, row_offsets
from .decays import chunk_decays, load_prefix, load_suffix, load_weight
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
def side_flow(
    pairs, inter, grad, t, i, row_valid, valid, m, decays, H,
    M: tl.constexpr, LOG_C: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """What of one side's reads crosses each token, and the gradient of each write weight, both [C, BM].

    pairs [rows, C] and inter [rows, BM] are products (q with k and K, or do with v and V) which grad (ds or p) weighs.
    A read crosses its (right) block up to itself, a write the rest of its (left) block.
    """
    # Writes before this chunk read in it at token t' cross every t <= t'.
    read = grad * inter * load_prefix(decays, LOG_C, t, row_valid, m, H, M, LOG_C)
    flow = masked_dot(t[None, :] >= i[:, None], read, CT, PREC)
    dw = dot(tl.trans(tl.where(t[:, None] == i[None, :], pairs, 0.0).to(CT)), grad, CT, PREC)
    for level in range(LOG_C):
        block = (t >> level)[:, None] == (i >> level)[None, :]
        x = tl.where(pairs_at(t, i, level), pairs, 0.0).to(CT)
        decayed = grad * load_prefix(decays, level, t, row_valid, m, H, M, LOG_C)
        suffix = load_suffix(decays, level, i, valid, m, H, M, LOG_C)
        we = load_weight(decays, i, valid, m, H, M, LOG_C) * suffix
        read = decayed * dot(x, we, CT, PREC)
        flow += masked_dot(tl.trans(block) & (t[None, :] >= i[:, None]), read, CT, PREC)
        written = dot(tl.trans(x), decayed, CT, PREC)
        beside = ((i >> level)[:, None] == (i >> level)[None, :]) & (i[None, :] < i[:, None])
        flow += masked_dot(beside, we * written, CT, PREC)
        dw += suffix * written
    return flow, dw


@triton.jit
def gate_kernel(
    q, k, v, decays, do, p_in, ds_in, states, dstates, gamma, dlog_alpha, bounds, T, NC, H, HQ, G, P,
    D: tl.constexpr, V: tl.constexpr, M: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr,
    BG: tl.constexpr, GROUP_TILES: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    PACKED: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """dlog_alpha of one (chunk, piece)."""
    c, h, start, stop, _n = own_chunk(bounds, T, NC, C, H, PACKED)
    if stop <= start:
        return
    i = tl.arange(0, C)
    m = tl.arange(0, BM)
    token = (start + i) * (H // P) + h // P
    valid = (start + i) < stop
    decays = chunk_decays(decays, start, h, H, M, LOG_C)
    where = c.to(tl.int64) * H + h
    state = states + where * (M * (D + V))
    dstate = dstates + where * (M * (D + V))

    # Writes in this chunk read after it, and writes before it read after it.
    reads, across = state_products(k, v, state, dstate, token, valid, m, D, V, M, C, BM, BD, BV, CT, PREC)
    dw = reads * load_suffix(decays, LOG_C, i, valid, m, H, M, LOG_C)
    earlier = i[None, :] < i[:, None]
    flow = masked_dot(earlier, load_weight(decays, i, valid, m, H, M, LOG_C) * dw, CT, PREC)
    flow += (tl.load(gamma + where * M + m, mask=m < M, other=0.0) * across)[None, :]

    for tile in range(GROUP_TILES):
        t, row, row_valid = row_offsets(start, stop, h // P, tile * BG, HQ, G, C, BG)
        _, at, _ = row_offsets(start, stop, h, tile * BG, HQ * P, G, C, BG)
        slot = at[:, None] * M + m[None, :]
        slot_mask = row_valid[:, None] & (m < M)[None, :]
        pairs, inter = products(
            q, k, state, row, row_valid, token, valid, m, D, BD, M, D + V, C * BG, C, BM, CT, PREC
        )  # fmt: skip
        ds = tl.load(ds_in + slot, mask=slot_mask, other=0.0)
        crossing, written = side_flow(
            pairs, inter, ds, t, i, row_valid, valid, m, decays, H, M, LOG_C, CT, PREC
        )  # fmt: skip
        flow += crossing
        dw += written
        pairs, inter = products(
            do, v, state + D, row, row_valid, token, valid, m, V, BV, M, D + V, C * BG, C, BM, CT, PREC
        )  # fmt: skip
        p = tl.load(p_in + slot, mask=slot_mask, other=0.0)
        crossing, written = side_flow(
            pairs, inter, p, t, i, row_valid, valid, m, decays, H, M, LOG_C, CT, PREC
        )  # fmt: skip
        flow += crossing
        dw += written
    grad = flow - load_prefix(decays, 0, i, valid, m, H, M, LOG_C) * dw
    cell = (start + i) * H + h
    tl.store(dlog_alpha + cell[:, None] * M + m[None, :], grad, mask=valid[:, None] & (m < M)[None, :])
