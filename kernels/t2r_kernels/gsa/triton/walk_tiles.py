"""What the backward pass of the fast path computes of each tile of 16 tokens by itself: scores and softmax again, their
gradients, dq, and what dlog_alpha gets from reads in the tile."""

import triton
import triton.language as tl

from ...triton_chunks import STEP, exact_sum, load_rows, own_chunk, row_offsets
from .common import load_log2_alpha, readable, write_weight
from .forward import piece_softmax2, softmax2
from .walk import TILE, TINY, read_factors, times_tiny


@triton.jit
def mm(a, b, CT: tl.constexpr):
    return tl.dot(a.to(CT), b.to(CT), input_precision="ieee")


@triton.jit
def load_part(state, m, d, WIDTH: tl.constexpr, STRIDE: tl.constexpr, M: tl.constexpr):
    """Columns d of a state [M, WIDTH] with rows STRIDE apart."""
    return tl.load(state + m[:, None] * STRIDE + d[None, :], mask=(m < M)[:, None] & (d < WIDTH)[None, :], other=0.0)


@triton.jit
def tile_products(
    x, y, state, row, row_valid, token, token_valid, m,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, M: tl.constexpr, STRIDE: tl.constexpr,
    R: tl.constexpr, BM: tl.constexpr, CT: tl.constexpr,
):  # fmt: skip
    """x [rows, WIDTH] times y [16, WIDTH] of the tile's tokens, and times the state [M, WIDTH] that the tile meets."""
    intra = tl.zeros([R, TILE], tl.float32)
    inter = tl.zeros([R, BM], tl.float32)
    for d0 in range(0, WIDTH, BLOCK):
        d = d0 + tl.arange(0, BLOCK)
        xb = load_rows(x, row, row_valid, WIDTH, d, CT)
        yb = load_rows(y, token, token_valid, WIDTH, d, CT)
        sb = load_part(state, m, d, WIDTH, STRIDE, M)
        intra = tl.dot(xb, tl.trans(yb), intra, input_precision="ieee")
        inter = tl.dot(xb, tl.trans(sb), inter, input_precision="ieee")
    return intra, inter


@triton.jit
def tile_reads(
    x, y, state, wi, causal, row, row_valid, token, token_valid, m,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, M: tl.constexpr, STRIDE: tl.constexpr,
    R: tl.constexpr, BM: tl.constexpr, CT: tl.constexpr,
):  # fmt: skip
    """What x reads of each slot, [rows, BM], but for the row's factor; and x times y of earlier tokens, [rows, 16]."""
    intra, inter = tile_products(x, y, state, row, row_valid, token, token_valid, m, WIDTH, BLOCK, M, STRIDE, R, BM, CT)
    intra = tl.where(causal, intra, 0.0).to(CT)
    return tl.dot(intra, wi, inter * TINY, input_precision="ieee"), intra


@triton.jit
def tile_statistics_kernel(
    q, k, v, log_alpha, visible, do, tiles, lse, delta, bounds, T, NC, H, HQ, G, P, scale_log2,
    D: tl.constexpr, V: tl.constexpr, M: tl.constexpr, BG: tl.constexpr, BM: tl.constexpr,
    BD: tl.constexpr, BV: tl.constexpr, PACKED: tl.constexpr, LIMITED: tl.constexpr, CT: tl.constexpr,
):  # fmt: skip
    """One (tile, piece): log2 of the sum of its 2^score, and do . o of the output it would give alone."""
    _c, h, start, stop, n = own_chunk(bounds, T, NC, TILE, H, PACKED)
    if stop <= start:
        return
    i = tl.arange(0, TILE)
    m = tl.arange(0, BM)
    token = (start + i) * (H // P) + h // P
    valid = (start + i) < stop
    t, row, row_valid = row_offsets(start, stop, h // P, 0, HQ, G, TILE, BG)
    _, at, _ = row_offsets(start, stop, h, 0, HQ * P, G, TILE, BG)
    x = load_log2_alpha(log_alpha, start, stop, h, H, M, TILE, BM)
    w = write_weight(x)
    factor, key = read_factors(x, w, t, CT)
    wi = (w * key).to(CT)
    causal = i[None, :] <= t[:, None]
    state = tiles + ((start // TILE + n) * H + h) * (M * (D + V))
    s, _ = tile_reads(
        q, k, state, wi, causal, row, row_valid, token, valid, m, D, BD, M, D + V, TILE * BG, BM, CT
    )  # fmt: skip
    s = s * (factor * scale_log2)
    p, sums = piece_softmax2(s, readable(visible, start, t, row_valid, m, M, LIMITED, h % P * M))
    dp, _ = tile_reads(
        do, v, state + D, wi, causal, row, row_valid, token, valid, m, V, BV, M, D + V, TILE * BG, BM, CT
    )  # fmt: skip
    dp = dp * factor
    tl.store(lse + at, sums, mask=row_valid)
    tl.store(delta + at, tl.sum(p * dp, 1), mask=row_valid)


@triton.jit
def tile_query_kernel(
    q, k, v, log_alpha, visible, do, tiles, lse, delta, dq, p_out, ds_out, da_out, a_out, dlog_alpha, bounds, T, NC, H,
    HQ, G, P, scale, scale_log2,
    D: tl.constexpr, V: tl.constexpr, M: tl.constexpr, BG: tl.constexpr, BM: tl.constexpr,
    BD: tl.constexpr, BV: tl.constexpr, PACKED: tl.constexpr, LIMITED: tl.constexpr, CT: tl.constexpr,
):  # fmt: skip
    """One (tile, piece): dq; p and ds times the decay from the tile's start, which the reverse walk sums; the matrices
    a (from p) and dA (from ds) for dv and dk; and what dlog_alpha gets from reads in this tile. lse and delta are those
    of all pieces, where there are several."""
    _c, h, start, stop, n = own_chunk(bounds, T, NC, TILE, H, PACKED)
    if stop <= start:
        return
    i = tl.arange(0, TILE)
    m = tl.arange(0, BM)
    token = (start + i) * (H // P) + h // P
    valid = (start + i) < stop
    t, row, row_valid = row_offsets(start, stop, h // P, 0, HQ, G, TILE, BG)
    _, at, _ = row_offsets(start, stop, h, 0, HQ * P, G, TILE, BG)
    x = load_log2_alpha(log_alpha, start, stop, h, H, M, TILE, BM)
    w = write_weight(x)
    factor, key = read_factors(x, w, t, CT)
    wi = (w * key).to(CT)
    causal = i[None, :] <= t[:, None]
    state = tiles + ((start // TILE + n) * H + h) * (M * (D + V))

    s_raw, qk = tile_reads(
        q, k, state, wi, causal, row, row_valid, token, valid, m, D, BD, M, D + V, TILE * BG, BM, CT
    )  # fmt: skip
    s = s_raw * (factor * scale_log2)
    seen = readable(visible, start, t, row_valid, m, M, LIMITED, h % P * M)
    if lse is None:
        p = softmax2(s, seen)
    else:
        total = tl.load(lse + row, mask=row_valid, other=0.0)
        p = tl.exp2(tl.where(seen, s, float("-inf")) - total[:, None])
    dp_raw, ov = tile_reads(
        do, v, state + D, wi, causal, row, row_valid, token, valid, m, V, BV, M, D + V, TILE * BG, BM, CT
    )  # fmt: skip
    dp = dp_raw * factor
    if lse is None:
        mean = tl.sum(p * dp, 1)
    else:
        mean = tl.load(delta + row, mask=row_valid, other=0.0)
    pf = p * factor
    pb = pf.to(CT)
    db = (pf * (dp * scale - (mean * scale)[:, None])).to(CT)
    slot = at[:, None] * M + m[None, :]
    slot_mask = row_valid[:, None] & (m < M)[None, :]
    tl.store(p_out + slot, times_tiny(pb, CT), mask=slot_mask)
    ds = times_tiny(db, CT)
    tl.store(ds_out + slot, ds, mask=slot_mask)
    pair = at[:, None] * TILE + i[None, :]
    pair_mask = row_valid[:, None] & (i >= 0)[None, :]
    a = tl.where(causal, mm(pb, tl.trans(wi), CT), 0.0)
    tl.store(a_out + pair, a, mask=pair_mask)
    da = tl.where(causal, mm(db, tl.trans(wi), CT), 0.0).to(CT)
    tl.store(da_out + pair, da, mask=pair_mask)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        dqb = mm(ds, load_part(state, m, d, D, D + V, M), CT)
        dqb = tl.dot(da, load_rows(k, token, valid, D, d, CT), dqb, input_precision="ieee")
        tl.store(dq + at[:, None] * D + d[None, :], dqb, mask=row_valid[:, None] & (d < D)[None, :])

    # What crosses each token: what is read from it on, of the state and of pairs, less what pairs write from it on. The
    # difference is at least 2^-13 of its terms, for so steps are floored.
    later = t[None, :] >= i[:, None]
    dw = mm(tl.trans(qk), db, CT) + mm(tl.trans(ov), pb, CT)
    flow = exact_sum(later, db.to(tl.float32) * s_raw + pb.to(tl.float32) * dp_raw, CT)
    flow -= exact_sum(i[None, :] >= i[:, None], wi.to(tl.float32) * dw, CT)
    # Each term crosses its token by the floored gate.
    grad = flow * tl.exp2(x - tl.maximum(x, STEP)) - tl.exp2(x) * key * dw
    cell = (start + i) * H + h
    tl.store(dlog_alpha + cell[:, None] * M + m[None, :], grad, mask=valid[:, None] & (m < M)[None, :])
