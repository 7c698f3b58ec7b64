"""The backward pass, from q, k, v, log_alpha and the upstream gradients alone.

1. States at chunk starts again (as in the forward pass). Where the slots come in pieces, `statistics_kernel` takes the
   softmax's sums of each, and dq, dk and dv are sums over pieces in the end.
2. `query_kernel`, per chunk: scores and softmax again, then dp, ds and dq; leaves p, ds and the two intra-chunk
   matrices dA (from ds) and W (from p), and each chunk's contribution to the gradient of the states before it.
3. The same scan as in the forward pass, in reverse: gradients of the states at chunk ends, one scan for K and V.
4. `key_kernel`, per chunk: dk and dv. `gate_kernel`, per chunk: dlog_alpha.

The gradient of log_alpha[t, m] is alpha times the flow that crosses token t: over all pairs (write before t, read at or
after t). It is summed pair class by pair class (state to state, state to chunk, chunk to state, and each level of the
tree), each term carrying its own decay across t. No difference of long sums is formed, so a gate that forgets (alpha
near 0, the normal case of a ring of slots) gets the small gradient that it has and not the rounding of a large one.
"""

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
    row_offsets,
)
from ...triton_launch import launch
from .common import choose_blocks, readable
from .decays import chunk_decays, chunk_tables, load_prefix, load_suffix, load_weight
from .forward import piece_softmax2, products, read_both, softmax2, write_both
from .gate import gate_kernel
from .pieces import add, combine
from .states import chunk_states, scan


@triton.jit
def statistics_kernel(
    q, k, v, decays, visible, do, states, lse, delta, bounds, T, NC, H, HQ, G, P, scale_log2,
    D: tl.constexpr, V: tl.constexpr, M: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr,
    BG: tl.constexpr, GROUP_TILES: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    PACKED: tl.constexpr, LIMITED: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """One (chunk, piece): log2 of the sum of its 2^score, and do . o of the output it would give alone."""
    c, h, start, stop, _n = own_chunk(bounds, T, NC, C, H, PACKED)
    if stop <= start:
        return
    i = tl.arange(0, C)
    m = tl.arange(0, BM)
    token = (start + i) * (H // P) + h // P
    valid = (start + i) < stop
    decays = chunk_decays(decays, start, h, H, M, LOG_C)
    state = states + (c.to(tl.int64) * H + h) * (M * (D + V))
    for tile in range(GROUP_TILES):
        t, row, row_valid = row_offsets(start, stop, h // P, tile * BG, HQ, G, C, BG)
        _, at, _ = row_offsets(start, stop, h, tile * BG, HQ * P, G, C, BG)
        qk, qs = products(
            q, k, state, row, row_valid, token, valid, m, D, BD, M, D + V, C * BG, C, BM, CT, PREC
        )  # fmt: skip
        ov, os = products(
            do, v, state + D, row, row_valid, token, valid, m, V, BV, M, D + V, C * BG, C, BM, CT, PREC
        )  # fmt: skip
        s, dp = read_both(qk, qs, ov, os, t, i, row_valid, valid, m, decays, H, M, LOG_C, CT, PREC)
        seen = readable(visible, start, t, row_valid, m, M, LIMITED, h % P * M)
        p, sums = piece_softmax2(s * scale_log2, seen)
        tl.store(lse + at, sums, mask=row_valid)
        tl.store(delta + at, tl.sum(p * dp, 1), mask=row_valid)


@triton.jit
def state_gradient(
    x, y, out, row, row_valid, m, tile,
    WIDTH: tl.constexpr, STRIDE: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, CT: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """out [M, WIDTH] = sum over rows of y[row, m] x[row], added to by tiles after the first."""
    for d0 in range(0, WIDTH, BLOCK):
        d = d0 + tl.arange(0, BLOCK)
        mask = (m < M)[:, None] & (d < WIDTH)[None, :]
        u = tl.trans(dot(tl.trans(load_rows(x, row, row_valid, WIDTH, d, CT)), y, CT, PREC))
        if tile > 0:
            u += tl.load(out + m[:, None] * STRIDE + d[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(out + m[:, None] * STRIDE + d[None, :], u, mask=mask)


@triton.jit
def query_kernel(
    q, k, v, decays, visible, do, states, lse, delta, dq, p_out, ds_out, da_out, a_out, dstates, bounds, T, NC,
    H, HQ, G, P, scale, scale_log2,
    D: tl.constexpr, V: tl.constexpr, M: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr,
    BG: tl.constexpr, GROUP_TILES: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    PACKED: tl.constexpr, LIMITED: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """One (chunk, piece): dq, and what the later steps need of p and ds. lse and delta are those of all pieces, where
    there are several."""
    c, h, start, stop, _n = own_chunk(bounds, T, NC, C, H, PACKED)
    if stop <= start:
        return
    i = tl.arange(0, C)
    m = tl.arange(0, BM)
    token = (start + i) * (H // P) + h // P
    valid = (start + i) < stop
    decays = chunk_decays(decays, start, h, H, M, LOG_C)
    offset = (c.to(tl.int64) * H + h) * (M * (D + V))
    state = states + offset
    for tile in range(GROUP_TILES):
        t, row, row_valid = row_offsets(start, stop, h // P, tile * BG, HQ, G, C, BG)
        _, at, _ = row_offsets(start, stop, h, tile * BG, HQ * P, G, C, BG)
        qk, qs = products(
            q, k, state, row, row_valid, token, valid, m, D, BD, M, D + V, C * BG, C, BM, CT, PREC
        )  # fmt: skip
        ov, os = products(
            do, v, state + D, row, row_valid, token, valid, m, V, BV, M, D + V, C * BG, C, BM, CT, PREC
        )  # fmt: skip
        s, dp = read_both(qk, qs, ov, os, t, i, row_valid, valid, m, decays, H, M, LOG_C, CT, PREC)
        seen = readable(visible, start, t, row_valid, m, M, LIMITED, h % P * M)
        if lse is None:
            p = softmax2(s * scale_log2, seen)
        else:
            total = tl.load(lse + row, mask=row_valid, other=0.0)
            p = tl.exp2(tl.where(seen, s * scale_log2, float("-inf")) - total[:, None])
        if lse is None:
            mean = tl.sum(p * dp, 1)
        else:
            mean = tl.load(delta + row, mask=row_valid, other=0.0)
        ds = scale * p * (dp - mean[:, None])
        slot = at[:, None] * M + m[None, :]
        slot_mask = row_valid[:, None] & (m < M)[None, :]
        tl.store(p_out + slot, p, mask=slot_mask)
        tl.store(ds_out + slot, ds, mask=slot_mask)
        a, da = write_both(p, ds, t, i, row_valid, valid, m, decays, H, M, LOG_C, CT, PREC)
        da = da.to(CT)
        pair = at[:, None] * C + i[None, :]
        tl.store(a_out + pair, a, mask=row_valid[:, None] & (i >= 0)[None, :])
        tl.store(da_out + pair, da, mask=row_valid[:, None] & (i >= 0)[None, :])
        decay = load_prefix(decays, LOG_C, t, row_valid, m, H, M, LOG_C)
        pd = tl.where(row_valid[:, None], p * decay, 0.0).to(CT)
        dsd = (ds * decay).to(CT)
        for d0 in range(0, D, BD):
            d = d0 + tl.arange(0, BD)
            mask = (m < M)[:, None] & (d < D)[None, :]
            kb = load_rows(k, token, valid, D, d, CT)
            sb = tl.load(state + m[:, None] * (D + V) + d[None, :], mask=mask, other=0.0)
            dqb = dot(da, kb, CT, PREC) + dot(dsd, sb, CT, PREC)
            tl.store(dq + at[:, None] * D + d[None, :], dqb, mask=row_valid[:, None] & (d < D)[None, :])
        # In fp32 slices of 32 columns: 64 rows would take instructions of four warps, which hold more registers.
        BU: tl.constexpr = BD if PREC == "ieee" else min(BD, 32)
        BW: tl.constexpr = BV if PREC == "ieee" else min(BV, 32)
        state_gradient(q, dsd, dstates + offset, row, row_valid, m, tile, D, D + V, M, BU, CT, PREC)
        state_gradient(do, pd, dstates + offset + D, row, row_valid, m, tile, V, D + V, M, BW, CT, PREC)


@triton.jit
def write_gradient(
    out, pair, x, we, dstate, start, stop, cell, valid, m, i, h, HQ, G, P, STRIDE: tl.constexpr,
    WIDTH: tl.constexpr, M: tl.constexpr, C: tl.constexpr, BG: tl.constexpr, GROUP_TILES: tl.constexpr,
    BLOCK: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """out[i] = sum over rows of pair[row, i] x[row] + sum_m we[i, m] dstate[m]: dk (with dA, q) or dv (with W, do)."""
    for d0 in range(0, WIDTH, BLOCK):
        d = d0 + tl.arange(0, BLOCK)
        sb = tl.load(dstate + m[:, None] * STRIDE + d[None, :], mask=(m < M)[:, None] & (d < WIDTH)[None, :], other=0.0)
        acc = dot(we, sb, CT, PREC)
        for tile in range(GROUP_TILES):
            _, row, row_valid = row_offsets(start, stop, h // P, tile * BG, HQ, G, C, BG)
            _, at, _ = row_offsets(start, stop, h, tile * BG, HQ * P, G, C, BG)
            ab = tl.load(pair + at[:, None] * C + i[None, :], mask=row_valid[:, None] & (i >= 0)[None, :], other=0.0)
            acc += dot(tl.trans(ab), load_rows(x, row, row_valid, WIDTH, d, CT), CT, PREC)
        tl.store(out + cell[:, None] * WIDTH + d[None, :], acc, mask=valid[:, None] & (d < WIDTH)[None, :])


@triton.jit
def key_kernel(
    q, do, decays, da, a, dstates, dk, dv, bounds, T, NC, H, HQ, G, P,
    D: tl.constexpr, V: tl.constexpr, M: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr,
    BG: tl.constexpr, GROUP_TILES: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    PACKED: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """dk and dv of one (chunk, piece), already summed over the group."""
    c, h, start, stop, _n = own_chunk(bounds, T, NC, C, H, PACKED)
    if stop <= start:
        return
    i = tl.arange(0, C)
    m = tl.arange(0, BM)
    cell = (start + i) * H + h
    valid = (start + i) < stop
    decays = chunk_decays(decays, start, h, H, M, LOG_C)
    we = load_weight(decays, i, valid, m, H, M, LOG_C)
    we = (we * load_suffix(decays, LOG_C, i, valid, m, H, M, LOG_C)).to(CT)
    dstate = dstates + (c.to(tl.int64) * H + h) * (M * (D + V))
    write_gradient(
        dk, da, q, we, dstate, start, stop, cell, valid, m, i, h, HQ, G, P, D + V, D, M, C, BG, GROUP_TILES, BD, CT,
        PREC
    )  # fmt: skip
    write_gradient(
        dv, a, do, we, dstate + D, start, stop, cell, valid, m, i, h, HQ, G, P, D + V, V, M, C, BG, GROUP_TILES, BV,
        CT, PREC
    )  # fmt: skip


def backward(q, k, v, log_alpha, visible, do, dfinal, scale: float, initial, cu_seqlens):
    """(dq, dk, dv, dlog_alpha in fp32, gradients of the initial states in fp32 or None); slots as in `forward`."""
    B, T, HQ, D = q.shape
    (H, M), V, group = log_alpha.shape[2:], v.shape[-1], HQ // k.shape[2]
    P = H // k.shape[2]
    numerics = choose_numerics(q.dtype)
    blocks = choose_blocks(group, D, V, M, numerics.store.itemsize)
    chunks = find_chunks(B, T, blocks.chunk, cu_seqlens)
    C, store = blocks.chunk, numerics.store

    def empty(*shape, dtype):
        return torch.empty(*shape, dtype=dtype, device=q.device)

    sizes = (
        D, V, M, C, C.bit_length() - 1, blocks.group, blocks.group_tiles, blocks.slots, blocks.key, blocks.value,
    )  # fmt: skip
    options = {
        "PACKED": chunks.bounds is not None, "CT": numerics.operand, "PREC": numerics.precision,
    }  # fmt: skip
    grid, place = (chunks.count * H, 1, 1), (chunks.bounds, T, chunks.per_sequence, H, HQ, group, P)

    decays, gamma = chunk_tables(log_alpha, chunks, blocks, numerics)
    states = chunk_states(k, v, decays, gamma, initial, None, chunks, blocks, numerics)
    # Several tiles of one group add up their contributions in memory, which bf16 would round each time.
    summed = store if blocks.group_tiles == 1 else torch.float32
    dstates = empty(*states.shape, dtype=summed)
    dq, dk, dv = (empty(B, T, x.shape[2] * P, x.shape[3], dtype=x.dtype) for x in (q, k, v))
    p, ds, a, da = (empty(B, T, HQ * P, width, dtype=store) for width in (M, M, C, C))
    lse = delta = None
    if P > 1:
        lse, delta = (empty(B, T, HQ * P, 1, dtype=torch.float32) for _ in range(2))
        launch(
            statistics_kernel, grid,
            q, k, v, decays, visible, do, states, lse, delta, *place, scale * LOG2E, *sizes, **options,
            LIMITED=visible is not None, num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
        delta, lse = combine(delta, lse, group, P)
    launch(
        query_kernel, grid,
        q, k, v, decays, visible, do, states, lse, delta, dq, p, ds, da, a, dstates, *place, scale, scale * LOG2E,
        *sizes, **options, LIMITED=visible is not None, num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    dinitial = None
    if initial is not None:
        dinitial = tuple(torch.empty_like(s, dtype=torch.float32) for s in initial)
    scan(dstates, gamma, dfinal, dinitial, chunks, D, V, reverse=True)
    launch(
        key_kernel, grid,
        q, do, decays, da, a, dstates, dk, dv, *place, *sizes, **options, num_warps=4, num_stages=blocks.stages,
    )  # fmt: skip
    dlog_alpha = empty(*log_alpha.shape, dtype=torch.float32)
    launch(
        gate_kernel, grid,
        q, k, v, decays, do, p, ds, states, dstates, gamma, dlog_alpha, *place, *sizes, **options,
        num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    if P > 1:
        dq, dk, dv = add(dq, group, P), add(dk, 1, P), add(dv, 1, P)
    return dq, dk, dv, dlog_alpha, dinitial
