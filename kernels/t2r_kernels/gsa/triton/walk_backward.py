"""The fast backward pass in bf16, in tiles of 16 tokens; the steps and the gate's gradient are those of `backward.py`.

The states that tiles meet and their gradients are walked first (`walk.py`); everything else is parallel over tiles.
"""

import torch
import triton
import triton.language as tl

from ...triton_chunks import LOG2E, STEP, chunk_range, load_rows, pad, pairs_at, power_of_two, row_offsets
from . import launch
from .common import load_log2_alpha, readable, write_weight
from .forward import softmax2
from .walk import TILE, TINY, Walk, read_factors, rest_of_tile


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
def tile_query_kernel(
    q, k, v, log_alpha, visible, do, tiles, dq, p_out, ds_out, da_out, a_out, dlog_alpha, bounds, T, NC, H, HQ, G,
    scale, scale_log2,
    D: tl.constexpr, V: tl.constexpr, M: tl.constexpr, BG: tl.constexpr, BM: tl.constexpr,
    BD: tl.constexpr, BV: tl.constexpr, PACKED: tl.constexpr, LIMITED: tl.constexpr, CT: tl.constexpr,
):  # fmt: skip
    """One (tile, key/value head): dq; p and ds times the decay from the tile's start, which the reverse walk sums;
    the matrices a (from p) and dA (from ds) for dv and dk; and what dlog_alpha gets from reads in this tile."""
    pid = tl.program_id(0)
    c = pid // H
    h = pid - c * H
    start, stop, n = chunk_range(bounds, c, T, NC, TILE, PACKED)
    if stop <= start:
        return
    i = tl.arange(0, TILE)
    m = tl.arange(0, BM)
    token = (start + i) * H + h
    valid = (start + i) < stop
    t, row, row_valid = row_offsets(start, stop, h, 0, HQ, G, TILE, BG)
    x = load_log2_alpha(log_alpha, start, stop, h, H, M, TILE, BM)
    w = write_weight(x)
    factor, key = read_factors(x, w, t, CT)
    wi = (w * key).to(CT)
    causal = i[None, :] <= t[:, None]
    state = tiles + ((start // TILE + n) * H + h) * (M * (D + V))

    qk, qs = tile_products(q, k, state, row, row_valid, token, valid, m, D, BD, M, D + V, TILE * BG, BM, CT)
    qk = tl.where(causal, qk, 0.0).to(CT)
    qs = qs * TINY
    s = tl.dot(qk, wi, qs, input_precision="ieee") * (factor * scale_log2)
    p = softmax2(s, readable(visible, start, t, row_valid, m, M, LIMITED))
    ov, os = tile_products(do, v, state + D, row, row_valid, token, valid, m, V, BV, M, D + V, TILE * BG, BM, CT)
    ov = tl.where(causal, ov, 0.0).to(CT)
    os = os * TINY
    dp = tl.dot(ov, wi, os, input_precision="ieee") * factor
    ds = (scale * factor * p) * (dp - tl.sum(p * dp, 1)[:, None])
    pf = p * factor
    pb = pf.to(CT)
    db = ds.to(CT)
    slot = row[:, None] * M + m[None, :]
    slot_mask = row_valid[:, None] & (m < M)[None, :]
    tl.store(p_out + slot, pf * TINY, mask=slot_mask)
    tl.store(ds_out + slot, ds * TINY, mask=slot_mask)
    pair = row[:, None] * TILE + i[None, :]
    pair_mask = row_valid[:, None] & (i >= 0)[None, :]
    a = tl.where(causal, mm(pb, tl.trans(wi), CT), 0.0)
    tl.store(a_out + pair, a, mask=pair_mask)
    da = tl.where(causal, mm(db, tl.trans(wi), CT), 0.0).to(CT)
    tl.store(da_out + pair, da, mask=pair_mask)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        sb = load_part(state, m, d, D, D + V, M)
        dqb = mm(db, sb, CT) * TINY + mm(da, load_rows(k, token, valid, D, d, CT), CT)
        tl.store(dq + row[:, None] * D + d[None, :], dqb, mask=row_valid[:, None] & (d < D)[None, :])

    # What crosses each token: the state read later in the tile, then pairs of the tile, level by level.
    later = t[None, :] >= i[:, None]
    flow = mm(tl.where(later, 1.0, 0.0), ds * qs + pf * os, CT)
    dw = mm(tl.trans(qk), db, CT) + mm(tl.trans(ov), pb, CT)
    for level in tl.static_range(4):
        pairs = pairs_at(t, i, level)
        block = (t >> level)[None, :] == (i >> level)[:, None]
        ql = tl.where(pairs, qk, 0.0).to(CT)
        ol = tl.where(pairs, ov, 0.0).to(CT)
        reads = ds * mm(ql, wi, CT) + pf * mm(ol, wi, CT)
        flow += mm(tl.where(block & later, 1.0, 0.0), reads, CT)
        if level > 0:
            written = w * key * (mm(tl.trans(ql), db, CT) + mm(tl.trans(ol), pb, CT))
            beside = ((i >> level)[:, None] == (i >> level)[None, :]) & (i[None, :] < i[:, None])
            flow += mm(tl.where(beside, 1.0, 0.0), written, CT)
    # Each term crosses its token by the floored gate.
    grad = flow * tl.exp2(x - tl.maximum(x, STEP)) - tl.exp2(x) * key * dw
    tl.store(dlog_alpha + token[:, None] * M + m[None, :], grad, mask=valid[:, None] & (m < M)[None, :])


@triton.jit
def walk_key_columns(
    x, y, z, pair, write, gamma, tiles, states, out, reads, across, start, stop, n, c, h, H, HQ, G,
    WIDTH: tl.constexpr, E: tl.constexpr, SIDE: tl.constexpr, M: tl.constexpr, BG: tl.constexpr, BM: tl.constexpr,
    BLOCK: tl.constexpr, EMPTY: tl.constexpr, CT: tl.constexpr,
):  # fmt: skip
    """One side (K: SIDE 0, or V) of `walk_key_kernel`, over one segment from its end."""
    i = tl.arange(0, TILE)
    m = tl.arange(0, BM)
    d = tl.arange(0, BLOCK)
    inside = (m < M)[:, None] & (d < WIDTH)[None, :]
    cell = m[:, None] * E + SIDE + d[None, :]
    if EMPTY:
        grad = tl.zeros([BM, BLOCK], tl.float32)
    else:
        grad = tl.load(states + (c.to(tl.int64) * H + h) * (M * E) + cell, mask=inside, other=0.0)
    count = ((stop - start + TILE - 1) // TILE).to(tl.int32)
    first = (start // TILE + n) * H + h
    # No product consumes the state as it is, so Triton does not load it ahead: here that is done by hand.
    ahead = tl.load(tiles + (first + (count - 1) * H) * (M * E) + cell, mask=inside, other=0.0)
    for step in range(count):
        j = count - 1 - step
        tile = first + j * H
        state = ahead
        ahead = tl.load(tiles + tl.maximum(tile - H, first) * (M * E) + cell, mask=inside, other=0.0)
        begin = start + j * TILE
        token = (begin + i) * H + h
        valid = (begin + i) < stop
        _, row, row_valid = row_offsets(begin, stop, h, 0, HQ, G, TILE, BG)
        yb = load_rows(y, row, row_valid, WIDTH, d, CT)
        xb = load_rows(x, row, row_valid, M, m, CT)
        zb = load_rows(z, token, valid, WIDTH, d, CT)
        we = load_rows(write, token, valid, M, m, CT)
        ab = load_rows(pair, row, row_valid, TILE, i, CT)
        decay = tl.load(gamma + tile * M + m, mask=m < M, other=1.0)
        gb = grad.to(CT)
        tl.store(across + tile * M + m, tl.sum(grad * state.to(tl.float32), 1), mask=m < M)
        read = tl.dot(zb, tl.trans(gb), input_precision="ieee")
        tl.store(reads + token[:, None] * M + m[None, :], read, mask=valid[:, None] & (m < M)[None, :])
        o = tl.dot(we, gb, input_precision="ieee")
        o = tl.dot(tl.trans(ab), yb, o, input_precision="ieee")
        tl.store(out + token[:, None] * WIDTH + d[None, :], o, mask=valid[:, None] & (d < WIDTH)[None, :])
        grad = tl.dot(tl.trans(xb), yb, grad * decay[:, None], input_precision="ieee")


@triton.jit
def walk_key_kernel(
    q, k, v, do, p, ds, a, da, write, gamma, tiles, states, dk, dv, reads_k, reads_v, across_k, across_v, bounds, T, NS,
    S, H, HQ, G,
    D: tl.constexpr, V: tl.constexpr, M: tl.constexpr, BG: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr,
    PACKED: tl.constexpr, EMPTY: tl.constexpr, CT: tl.constexpr,
):  # fmt: skip
    """The reverse walk of one (segment, head): program (., 0) carries the gradient of K and leaves dk, program (., 1)
    that of V and leaves dv. For dlog_alpha they leave, each for its side, the products `reads` [B, T, H, M] of k or v
    with the gradient at the tile's end, and `across` [tiles, H, M] of the state at its start with that gradient."""
    c = tl.program_id(0) // H
    h = tl.program_id(0) - c * H
    start, stop, n = chunk_range(bounds, c, T, NS, S, PACKED)
    if stop <= start:
        return
    if tl.program_id(1) == 0:
        walk_key_columns(
            ds, q, k, da, write, gamma, tiles, states, dk, reads_k, across_k, start, stop, n, c, h, H, HQ, G, D, D + V,
            0, M, BG, BM, BLOCK, EMPTY, CT,
        )  # fmt: skip
    else:
        walk_key_columns(
            p, do, v, a, write, gamma, tiles, states, dv, reads_v, across_v, start, stop, n, c, h, H, HQ, G, V, D + V,
            D, M, BG, BM, BLOCK, EMPTY, CT,
        )  # fmt: skip


@triton.jit
def tile_gate_kernel(
    log_alpha, reads_k, reads_v, across_k, across_v, dlog_alpha, bounds, T, NC, H,
    M: tl.constexpr, BM: tl.constexpr, PACKED: tl.constexpr, CT: tl.constexpr,
):  # fmt: skip
    """Adds to dlog_alpha of one (tile, head) what is read after the tile."""
    pid = tl.program_id(0)
    c = pid // H
    h = pid - c * H
    start, stop, n = chunk_range(bounds, c, T, NC, TILE, PACKED)
    if stop <= start:
        return
    i = tl.arange(0, TILE)
    m = tl.arange(0, BM)
    cell = ((start + i) * H + h)[:, None] * M + m[None, :]
    mask = ((start + i) < stop)[:, None] & (m < M)[None, :]
    tile = ((start // TILE + n) * H + h) * M + m
    x = load_log2_alpha(log_alpha, start, stop, h, H, M, TILE, BM)
    reads = tl.load(reads_k + cell, mask=mask, other=0.0) + tl.load(reads_v + cell, mask=mask, other=0.0)
    across = tl.load(across_k + tile, mask=m < M, other=0.0) + tl.load(across_v + tile, mask=m < M, other=0.0)
    grad = tl.load(dlog_alpha + cell, mask=mask, other=0.0)
    dw = rest_of_tile(x, CT) * reads
    flow = mm(tl.where(i[None, :] < i[:, None], 1.0, 0.0), write_weight(x) * dw, CT)
    flow += (tl.exp2(tl.sum(x, 0)) * across)[None, :]
    tl.store(dlog_alpha + cell, grad + flow - tl.exp2(x) * dw, mask=mask)


def walk_backward(q, k, v, log_alpha, visible, do, dfinal, scale: float, initial, cu_seqlens, operand=tl.bfloat16):
    """(dq, dk, dv, dlog_alpha in fp32, gradients of the initial states in fp32 or None)."""
    B, T, HQ, D = q.shape
    H, V, M = k.shape[2], v.shape[-1], log_alpha.shape[-1]
    group = HQ // H
    walk = Walk(log_alpha, D, V, cu_seqlens, operand, False)
    tiles = walk.tile_states(((walk.operands, k), (walk.operands, v)), initial)

    def empty(width, dtype):
        return torch.empty(B, T, HQ, width, dtype=dtype, device=q.device)

    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    dlog_alpha = torch.empty(log_alpha.shape, dtype=torch.float32, device=q.device)
    p, ds, a, da = (empty(width, walk.store) for width in (M, M, 16, 16))
    place = (walk.tiles.bounds, T, walk.tiles.per_sequence, H, HQ, group)
    sizes = (D, V, M, power_of_two(group), pad(M))
    columns = [min(launch.QUERY_COLUMNS, pad(x)) for x in (D, V)]
    packed, grid = cu_seqlens is not None, (walk.tiles.count * H, 1, 1)
    launch.launch(
        tile_query_kernel, grid,
        q, k, v, log_alpha, visible, do, tiles, dq, p, ds, da, a, dlog_alpha, *place, scale, scale * LOG2E, *sizes,
        *columns, packed, visible is not None, operand, **launch.for_group(launch.QUERY, group),
    )  # fmt: skip
    dinitial = None
    if initial is not None:
        dinitial = tuple(torch.empty_like(s, dtype=torch.float32) for s in initial)
    states, segments, length = walk.starts(((ds, q), (p, do)), dfinal, dinitial, group=group, reverse=True)
    reads = [torch.empty_like(dlog_alpha) for _ in range(2)]
    across = [torch.empty_like(walk.gamma) for _ in range(2)]
    launch.launch(
        walk_key_kernel, (segments.count * H, 2, 1),
        q, k, v, do, p, ds, a, da, walk.operands, walk.gamma, tiles, states, dk, dv, *reads, *across, segments.bounds,
        T, segments.per_sequence, length, H, HQ, group, *sizes, max(pad(D), pad(V)), packed, states is None, operand,
        **launch.KEY,
    )  # fmt: skip
    launch.launch(
        tile_gate_kernel, grid,
        log_alpha, *reads, *across, dlog_alpha, walk.tiles.bounds, T, walk.tiles.per_sequence, H, M, pad(M), packed,
        operand, num_warps=2,
    )  # fmt: skip
    return dq, dk, dv, dlog_alpha, dinitial
