"""The fast backward pass in bf16, in tiles of 16 tokens; the steps and the gate's gradient are those of `backward.py`.

The states that tiles meet are walked first (`walk.py`), then everything that is parallel over tiles is done
(`walk_tiles.py`), then the gradients of the states are walked in reverse. Slots in several pieces share only the
softmax's sums, which `tile_statistics_kernel` takes beforehand; dq, dk and dv are then sums over pieces.
"""

import torch
import triton
import triton.language as tl

from ...triton_chunks import LOG2E, load_rows, own_chunk, pad, power_of_two, row_offsets
from ...triton_launch import launch
from . import configs, pieces
from .common import load_log2_alpha, write_weight
from .walk import TILE, Walk, rest_of_tile
from .walk_forward import load_operand, load_state
from .walk_tiles import mm, tile_query_kernel, tile_statistics_kernel


@triton.jit
def load_tile(tiles, tile, m, d, SIDE: tl.constexpr, WIDTH: tl.constexpr, E: tl.constexpr, M: tl.constexpr):
    """K's columns (SIDE 0) or V's of the state at a tile's start."""
    inside = (m < M)[:, None] & (d < WIDTH)[None, :]
    return tl.load(tiles + tile * (M * E) + SIDE + m[:, None] * E + d[None, :], mask=inside, other=0.0)


@triton.jit
def walk_key_kernel(
    q, k, v, do, p, ds, a, da, operands, gamma, tiles, states, dk, dv, reads, across, bounds, T, NS, S, H, HQ, G, P,
    D: tl.constexpr, V: tl.constexpr, M: tl.constexpr, BG: tl.constexpr, BM: tl.constexpr,
    BD: tl.constexpr, BV: tl.constexpr, PACKED: tl.constexpr, EMPTY: tl.constexpr, CT: tl.constexpr,
):  # fmt: skip
    """The reverse walk of one (segment, piece) with the gradients of both states in registers: leaves dk and dv of each
    tile as it passes. For dlog_alpha it leaves the products `reads` [B, T, H, M] of k and v with the gradients at the
    tile's end, and `across` [tiles, H, M] of the states at its start with those gradients."""
    c, h, start, stop, n = own_chunk(bounds, T, NS, S, H, PACKED)
    if stop <= start:
        return
    i = tl.arange(0, TILE)
    m = tl.arange(0, BM)
    d = tl.arange(0, BD)
    e = tl.arange(0, BV)
    if EMPTY:
        grad_k = tl.zeros([BM, BD], tl.float32)
        grad_v = tl.zeros([BM, BV], tl.float32)
    else:
        base = states + (c.to(tl.int64) * H + h) * (M * (D + V))
        grad_k = load_state(base, m, D, BD, D + V, M)
        grad_v = load_state(base + D, m, V, BV, D + V, M)
    count = ((stop - start + TILE - 1) // TILE).to(tl.int32)
    first = (start // TILE + n) * H + h
    for step in tl.range(count, disable_licm=True):
        j = count - 1 - step
        tile = first + j * H
        state_k = load_tile(tiles, tile, m, d, 0, D, D + V, M)
        state_v = load_tile(tiles, tile, m, e, D, V, D + V, M)
        begin = start + j * TILE
        token = (begin + i) * (H // P) + h // P
        cell = (begin + i) * H + h
        valid = (begin + i) < stop
        _, row, row_valid = row_offsets(begin, stop, h // P, 0, HQ, G, TILE, BG)
        _, at, _ = row_offsets(begin, stop, h, 0, HQ * P, G, TILE, BG)
        qb = load_rows(q, row, row_valid, D, d, CT)
        gb = load_rows(do, row, row_valid, V, e, CT)
        kb = load_rows(k, token, valid, D, d, CT)
        vb = load_rows(v, token, valid, V, e, CT)
        dsb = load_rows(ds, at, row_valid, M, m, CT)
        pb = load_rows(p, at, row_valid, M, m, CT)
        dab = load_rows(da, at, row_valid, TILE, i, CT)
        ab = load_rows(a, at, row_valid, TILE, i, CT)
        slot = cell[:, None] * M + m[None, :]
        slot_mask = valid[:, None] & (m < M)[None, :]
        we = load_operand(operands, cell, valid, 0, m, M, 1, CT)
        decay = tl.load(gamma + tile * M + m, mask=m < M, other=1.0)
        last_k = grad_k.to(CT)
        last_v = grad_v.to(CT)
        read = tl.dot(kb, tl.trans(last_k), input_precision="ieee")
        read = tl.dot(vb, tl.trans(last_v), read, input_precision="ieee")
        dkb = tl.dot(we, last_k, input_precision="ieee")
        dkb = tl.dot(tl.trans(dab), qb, dkb, input_precision="ieee")
        tl.store(dk + cell[:, None] * D + d[None, :], dkb, mask=valid[:, None] & (d < D)[None, :])
        dvb = tl.dot(we, last_v, input_precision="ieee")
        dvb = tl.dot(tl.trans(ab), gb, dvb, input_precision="ieee")
        tl.store(dv + cell[:, None] * V + e[None, :], dvb, mask=valid[:, None] & (e < V)[None, :])
        crossing = tl.sum(grad_k * state_k.to(tl.float32), 1) + tl.sum(grad_v * state_v.to(tl.float32), 1)
        grad_k = tl.dot(tl.trans(dsb), qb, grad_k * decay[:, None], input_precision="ieee")
        grad_v = tl.dot(tl.trans(pb), gb, grad_v * decay[:, None], input_precision="ieee")
        tl.store(across + tile * M + m, crossing, mask=m < M)
        tl.store(reads + slot, read, mask=slot_mask)


@triton.jit
def tile_gate_kernel(
    log_alpha, reads, across, dlog_alpha, bounds, T, NC, H,
    M: tl.constexpr, BM: tl.constexpr, PACKED: tl.constexpr, CT: tl.constexpr,
):  # fmt: skip
    """Adds to dlog_alpha of one (tile, head) what is read after the tile."""
    _c, h, start, stop, n = own_chunk(bounds, T, NC, TILE, H, PACKED)
    if stop <= start:
        return
    i = tl.arange(0, TILE)
    m = tl.arange(0, BM)
    cell = ((start + i) * H + h)[:, None] * M + m[None, :]
    mask = ((start + i) < stop)[:, None] & (m < M)[None, :]
    x = load_log2_alpha(log_alpha, start, stop, h, H, M, TILE, BM)
    grad = tl.load(dlog_alpha + cell, mask=mask, other=0.0)
    dw = rest_of_tile(x, CT) * tl.load(reads + cell, mask=mask, other=0.0)
    flow = mm(tl.where(i[None, :] < i[:, None], 1.0, 0.0), write_weight(x) * dw, CT)
    crossed = tl.load(across + ((start // TILE + n) * H + h) * M + m, mask=m < M, other=0.0)
    flow += (tl.exp2(tl.sum(x, 0)) * crossed)[None, :]
    tl.store(dlog_alpha + cell, grad + flow - tl.exp2(x) * dw, mask=mask)


def walk_backward(q, k, v, log_alpha, visible, do, dfinal, scale: float, initial, cu_seqlens, operand=tl.bfloat16):
    """(dq, dk, dv, dlog_alpha in fp32, gradients of the initial states in fp32 or None); slots as `walk_forward`."""
    B, T, HQ, D = q.shape
    (H, M), V, group = log_alpha.shape[2:], v.shape[-1], HQ // k.shape[2]
    P = H // k.shape[2]
    walk = Walk(log_alpha, P, D, V, cu_seqlens, operand, 1)
    tiles = walk.tile_states(((walk.operands, k), (walk.operands, v)), initial)

    def empty(heads, *width, dtype):
        return torch.empty(B, T, heads, *width, dtype=dtype, device=q.device)

    dq, dk, dv = (empty(x.shape[2] * P, x.shape[3], dtype=x.dtype) for x in (q, k, v))
    dlog_alpha = torch.empty(log_alpha.shape, dtype=torch.float32, device=q.device)
    p, ds, a, da = (empty(HQ * P, width, dtype=walk.store) for width in (M, M, 16, 16))
    place = (walk.tiles.bounds, T, walk.tiles.per_sequence, H, HQ, group, P)
    sizes = (D, V, M, power_of_two(group), pad(M))
    columns = [min(configs.QUERY_COLUMNS, pad(x)) for x in (D, V)]
    packed, grid = cu_seqlens is not None, (walk.tiles.count * H, 1, 1)
    options = configs.for_group(configs.QUERY, group)
    lse = delta = None
    if P > 1:
        lse, delta = (empty(HQ * P, 1, dtype=torch.float32) for _ in range(2))
        launch(
            tile_statistics_kernel, grid,
            q, k, v, log_alpha, visible, do, tiles, lse, delta, *place, scale * LOG2E, *sizes, *columns, packed,
            visible is not None, operand, **options,
        )  # fmt: skip
        delta, lse = pieces.combine(delta, lse, group, P)
    launch(
        tile_query_kernel, grid,
        q, k, v, log_alpha, visible, do, tiles, lse, delta, dq, p, ds, da, a, dlog_alpha, *place, scale, scale * LOG2E,
        *sizes, *columns, packed, visible is not None, operand, **options,
    )  # fmt: skip
    dinitial = None
    if initial is not None:
        dinitial = tuple(torch.empty_like(s, dtype=torch.float32) for s in initial)
    states, segments, length = walk.starts(
        ((ds, q), (p, do)), dfinal, dinitial, 1, configs.KEY_PROGRAMS, group=group, reverse=True
    )
    reads, across = torch.empty_like(dlog_alpha), torch.empty_like(walk.gamma)
    launch(
        walk_key_kernel, (segments.count * H, 1, 1),
        q, k, v, do, p, ds, a, da, walk.operands, walk.gamma, tiles, states, dk, dv, reads, across, segments.bounds, T,
        segments.per_sequence, length, H, HQ, group, P, *sizes, pad(D), pad(V), packed, states is None, operand,
        **configs.KEY,
    )  # fmt: skip
    launch(
        tile_gate_kernel, grid,
        log_alpha, reads, across, dlog_alpha, walk.tiles.bounds, T, walk.tiles.per_sequence, H, M, pad(M), packed,
        operand, num_warps=2,
    )  # fmt: skip
    if P > 1:
        dq, dk, dv = pieces.add(dq, group, P), pieces.add(dk, 1, P), pieces.add(dv, 1, P)
    return dq, dk, dv, dlog_alpha, dinitial
