"""The fast backward pass in bf16, in tiles of 16 tokens; the steps and the gate's gradient are those of `backward.py`.

The states that tiles meet are walked first (`walk.py`), then everything that is parallel over tiles is done
(`walk_tiles.py`), then the gradients of the states are walked in reverse. Slots in several pieces share only the
softmax's sums, which `tile_statistics_kernel` takes beforehand; dq, dk and dv are then sums over pieces.
"""

import torch
import triton
import triton.language as tl

from ...triton_chunks import LOG2E, chunk_range, load_rows, pad, power_of_two, row_offsets
from ...triton_launch import launch
from . import configs, pieces
from .common import load_log2_alpha, write_weight
from .walk import TILE, Walk, rest_of_tile
from .walk_tiles import mm, tile_query_kernel, tile_statistics_kernel


@triton.jit
def walk_key_columns(
    x, y, z, pair, write, gamma, tiles, states, out, reads, across, start, stop, n, c, h, H, HQ, G, P,
    WIDTH: tl.constexpr, E: tl.constexpr, SIDE: tl.constexpr, M: tl.constexpr, BG: tl.constexpr,
    BM: tl.constexpr, BLOCK: tl.constexpr, EMPTY: tl.constexpr, CT: tl.constexpr,
):  # fmt: skip
    """One side (K: SIDE 0, or V) of `walk_key_kernel`, over one segment from its end."""
    i = tl.arange(0, TILE)
    m = tl.arange(0, BM)
    d = tl.arange(0, BLOCK)
    inside = (m < M)[:, None] & (d < WIDTH)[None, :]
    part = m[:, None] * E + SIDE + d[None, :]
    if EMPTY:
        grad = tl.zeros([BM, BLOCK], tl.float32)
    else:
        grad = tl.load(states + (c.to(tl.int64) * H + h) * (M * E) + part, mask=inside, other=0.0)
    count = ((stop - start + TILE - 1) // TILE).to(tl.int32)
    first = (start // TILE + n) * H + h
    # No product consumes the state as it is, so Triton does not load it ahead: here that is done by hand.
    ahead = tl.load(tiles + (first + (count - 1) * H) * (M * E) + part, mask=inside, other=0.0)
    for step in range(count):
        j = count - 1 - step
        tile = first + j * H
        state = ahead
        ahead = tl.load(tiles + tl.maximum(tile - H, first) * (M * E) + part, mask=inside, other=0.0)
        begin = start + j * TILE
        cell = (begin + i) * H + h
        valid = (begin + i) < stop
        _, row, row_valid = row_offsets(begin, stop, h // P, 0, HQ, G, TILE, BG)
        _, at, _ = row_offsets(begin, stop, h, 0, HQ * P, G, TILE, BG)
        yb = load_rows(y, row, row_valid, WIDTH, d, CT)
        xb = load_rows(x, at, row_valid, M, m, CT)
        zb = load_rows(z, (begin + i) * (H // P) + h // P, valid, WIDTH, d, CT)
        we = load_rows(write, cell, valid, M, m, CT)
        ab = load_rows(pair, at, row_valid, TILE, i, CT)
        decay = tl.load(gamma + tile * M + m, mask=m < M, other=1.0)
        gb = grad.to(CT)
        tl.store(across + tile * M + m, tl.sum(grad * state.to(tl.float32), 1), mask=m < M)
        read = tl.dot(zb, tl.trans(gb), input_precision="ieee")
        tl.store(reads + cell[:, None] * M + m[None, :], read, mask=valid[:, None] & (m < M)[None, :])
        o = tl.dot(we, gb, input_precision="ieee")
        o = tl.dot(tl.trans(ab), yb, o, input_precision="ieee")
        tl.store(out + cell[:, None] * WIDTH + d[None, :], o, mask=valid[:, None] & (d < WIDTH)[None, :])
        grad = tl.dot(tl.trans(xb), yb, grad * decay[:, None], input_precision="ieee")


@triton.jit
def walk_key_kernel(
    q, k, v, do, p, ds, a, da, write, gamma, tiles, states, dk, dv, reads_k, reads_v, across_k, across_v, bounds, T, NS,
    S, H, HQ, G, P,
    D: tl.constexpr, V: tl.constexpr, M: tl.constexpr, BG: tl.constexpr, BM: tl.constexpr,
    BLOCK: tl.constexpr, PACKED: tl.constexpr, EMPTY: tl.constexpr, CT: tl.constexpr,
):  # fmt: skip
    """The reverse walk of one (segment, piece): program (., 0) carries the gradient of K and leaves dk, program (., 1)
    that of V and leaves dv. For dlog_alpha they leave, each for its side, the products `reads` [B, T, H, M] of k or v
    with the gradient at the tile's end, and `across` [tiles, H, M] of the state at its start with that gradient."""
    c = tl.program_id(0) // H
    h = tl.program_id(0) - c * H
    start, stop, n = chunk_range(bounds, c, T, NS, S, PACKED)
    if stop <= start:
        return
    if tl.program_id(1) == 0:
        walk_key_columns(
            ds, q, k, da, write, gamma, tiles, states, dk, reads_k, across_k, start, stop, n, c, h, H, HQ, G, P, D,
            D + V, 0, M, BG, BM, BLOCK, EMPTY, CT,
        )  # fmt: skip
    else:
        walk_key_columns(
            p, do, v, a, write, gamma, tiles, states, dv, reads_v, across_v, start, stop, n, c, h, H, HQ, G, P, V,
            D + V, D, M, BG, BM, BLOCK, EMPTY, CT,
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
    """(dq, dk, dv, dlog_alpha in fp32, gradients of the initial states in fp32 or None); slots as `walk_forward`."""
    B, T, HQ, D = q.shape
    (H, M), V, group = log_alpha.shape[2:], v.shape[-1], HQ // k.shape[2]
    P = H // k.shape[2]
    walk = Walk(log_alpha, P, D, V, cu_seqlens, operand, False)
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
    states, segments, length = walk.starts(((ds, q), (p, do)), dfinal, dinitial, group=group, reverse=True)
    reads = [torch.empty_like(dlog_alpha) for _ in range(2)]
    across = [torch.empty_like(walk.gamma) for _ in range(2)]
    launch(
        walk_key_kernel, (segments.count * H, 2, 1),
        q, k, v, do, p, ds, a, da, walk.operands, walk.gamma, tiles, states, dk, dv, *reads, *across, segments.bounds,
        T, segments.per_sequence, length, H, HQ, group, P, *sizes, max(pad(D), pad(V)), packed, states is None, operand,
        **configs.KEY,
    )  # fmt: skip
    launch(
        tile_gate_kernel, grid,
        log_alpha, *reads, *across, dlog_alpha, walk.tiles.bounds, T, walk.tiles.per_sequence, H, M, pad(M), packed,
        operand, num_warps=2,
    )  # fmt: skip
    if P > 1:
        dq, dk, dv = pieces.add(dq, group, P), pieces.add(dk, 1, P), pieces.add(dv, 1, P)
    return dq, dk, dv, dlog_alpha, dinitial
