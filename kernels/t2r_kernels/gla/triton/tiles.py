"""Gradients that pairs inside each tile give to the gated side; no state takes part, so every tile stands for itself.

Apart from the walk that adds the rest (`backward.py`) because both at once hold more than the registers do.
"""

import torch
import triton
import triton.language as tl

from ...triton_chunks import (
    STEP,
    Chunks,
    add_dot,
    dot,
    exact_sum,
    find_chunks,
    load_rows,
    own_chunk,
    pad,
    pairs_at,
    prefix_decay,
    row_offsets,
    split,
    suffix_decay,
)
from ...triton_launch import launch
from . import configs
from .common import ROWS, SCALAR, Plan, load_gate, load_written
from .decays import Decays, pair_decay, pair_factors


@triton.jit
def alike_gradient(
    rb, yb, b, decay, t, d, dy, flow, KIND: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr
):  # fmt: skip
    """Pairs of one tile whose gate has equal rows, given b[row, i] = p_t . x_i, their decay [rows, SUB] and rb in fp32:
    dr [rows, BR]; and added to what came in, d(w y) [SUB, BR] and what crosses each token, summed over d, in the column
    d = 0 of [SUB, BR]."""
    i = tl.arange(0, yb.shape[0])
    pairs = b * decay
    dr = dot(pairs, yb, CT, PREC)
    dy = add_dot(dy, tl.trans(pairs.to(CT)), rb, CT, PREC)
    if KIND == SCALAR:
        terms = pairs * dot(rb, tl.trans(yb), CT, PREC)
        later = dot(tl.where(t[None, :] >= i[:, None], 1.0, 0.0), terms, CT, PREC)
        crossing = tl.sum(tl.where(i[None, :] < i[:, None], later, 0.0), 1)
        flow += tl.where((d == 0)[None, :], crossing[:, None], 0.0)
    return dr, dy, flow


@triton.jit
def factored_gradient(rb, yb, b, right, left, t, dy, flow, CT: tl.constexpr, PREC: tl.constexpr):
    """Like `alike_gradient` for factored decays; dy lacks the factor `left`. What crosses a token is what is read from
    it on less what is written from it on: sums over one tile of the same rounded terms, in all their bits."""
    i = tl.arange(0, yb.shape[0])
    pairs = tl.where(i[None, :] <= t[:, None], b, 0.0).to(CT)
    reader = (rb * right).to(CT)
    writer = (yb * left).to(CT)
    got = dot(pairs, writer, CT, PREC)
    gave = dot(tl.trans(pairs), reader, CT, PREC)
    dy += gave
    flow += exact_sum(t[None, :] >= i[:, None], reader.to(tl.float32) * got, CT)
    flow -= exact_sum(i[None, :] >= i[:, None], writer.to(tl.float32) * gave, CT)
    return got * right, dy, flow


@triton.jit
def tree_gradient(
    rb, yb, b, x, t, dy, flow,
    LOG_SUB: tl.constexpr, CT: tl.constexpr, SPLIT: tl.constexpr, PREC: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Like `alike_gradient` for log2 alpha x [SUB, BR] with rows of its own, by the tree."""
    i = tl.arange(0, x.shape[0])
    high, low = split(x, SPLIT)
    same = tl.where(t[:, None] == i[None, :], b, 0.0).to(CT)
    dr = dot(same, yb, CT, PREC)
    dy = add_dot(dy, tl.trans(same), rb, CT, PREC)
    for level in range(LOG_SUB):
        right = prefix_decay(t, i, high, low, level, SPLIT, EXACT)
        after = suffix_decay(i, high, low, level, SPLIT, EXACT)
        pairs = tl.where(pairs_at(t, i, level), b, 0.0).to(CT)
        reader = rb * right
        got = dot(pairs, yb * after, CT, PREC)
        dr += got * right
        gave = dot(tl.trans(pairs), reader, CT, PREC) * after
        dy += gave
        # A read crosses its (right) block up to itself, a write the rest of its (left) block.
        block = (t >> level)[None, :] == (i >> level)[:, None]
        flow = add_dot(flow, tl.where(block & (t[None, :] >= i[:, None]), 1.0, 0.0), reader * got, CT, PREC)
        beside = ((i >> level)[:, None] == (i >> level)[None, :]) & (i[None, :] < i[:, None])
        flow = add_dot(flow, tl.where(beside, 1.0, 0.0), yb * gave, CT, PREC)
    return dr, dy, flow


@triton.jit
def tile_kernel(
    r, p, y, x, write, gate, decays, dr, dy, dgate, bounds, T, NC, H, HQ, G, scale,
    R: tl.constexpr, X: tl.constexpr, SUB: tl.constexpr, LOG_SUB: tl.constexpr, BG: tl.constexpr,
    GROUP_TILES: tl.constexpr, BR: tl.constexpr, BX: tl.constexpr, PARTS: tl.constexpr, FIRST: tl.constexpr,
    STORE_DR: tl.constexpr, PACKED: tl.constexpr, KIND: tl.constexpr, WEIGHTED: tl.constexpr, CT: tl.constexpr,
    SPLIT: tl.constexpr, PREC: tl.constexpr, EXACT: tl.constexpr, FACTORED: tl.constexpr,
):  # fmt: skip
    """One (tile, head) and slice of the gated side. The gradient of a gate per head is part FIRST + slice of PARTS."""
    _c, h, start, stop, _ = own_chunk(bounds, T, NC, SUB, H, PACKED)
    if stop <= start:
        return
    i = tl.arange(0, SUB)
    k = tl.arange(0, BR)
    d = tl.program_id(1) * BR + k
    token = (start + i) * H + h
    valid = (start + i) < stop
    yb = load_written(y, write, start, stop, h, H, d, R, SUB, KIND, WEIGHTED)
    dyb = tl.zeros([SUB, BR], tl.float32)
    flow = tl.zeros([SUB, BR], tl.float32)
    for group in range(GROUP_TILES):
        t, row, row_valid = row_offsets(start, stop, h, group * BG, HQ, G, SUB, BG)
        b = tl.zeros([SUB * BG, SUB], tl.float32)
        for e0 in range(0, X, BX):
            e = e0 + tl.arange(0, BX)
            pb = load_rows(p, row, row_valid, X, e, CT)
            b = add_dot(b, pb, tl.trans(load_rows(x, token, valid, X, e, CT)), CT, PREC)
        rb = load_rows(r, row, row_valid, R, d, tl.float32) * scale
        if KIND != ROWS:
            decay = pair_decay(decays, start, stop, t, h, H, SUB, KIND, SPLIT, EXACT, FACTORED)
            drb, dyb, flow = alike_gradient(rb, yb, b, decay, t, k, dyb, flow, KIND, CT, PREC)
        elif FACTORED:
            right, left = pair_factors(decays, start + i, start + t, valid, row_valid, h, H, d, R)
            drb, dyb, flow = factored_gradient(rb, yb, b, right, left, t, dyb, flow, CT, PREC)
        else:
            g = load_gate(gate, start, stop, h, H, d, R, SUB, KIND)
            drb, dyb, flow = tree_gradient(rb, yb, b, g, t, dyb, flow, LOG_SUB, CT, SPLIT, PREC, EXACT)
        if STORE_DR:
            tl.store(dr + row[:, None] * R + d[None, :], scale * drb, mask=row_valid[:, None] & (d < R)[None, :])
    if FACTORED and KIND == ROWS:
        _right, left = pair_factors(decays, start + i, start + i, valid, valid, h, H, d, R)
        dyb *= left
        # Every term carries alpha of the token that it crosses, and the factors its floor.
        g = load_gate(gate, start, stop, h, H, d, R, SUB, KIND)
        flow *= tl.exp2(g - tl.maximum(g, STEP))
    cell = token[:, None] * R + d[None, :]
    mask = valid[:, None] & (d < R)[None, :]
    tl.store(dy + cell, dyb, mask=mask)
    if KIND == ROWS:
        tl.store(dgate + cell, flow, mask=mask)
    else:
        tl.store(dgate + token * PARTS + (FIRST + tl.program_id(1)), tl.sum(flow, 1), mask=valid)


def tile_slices(plan: Plan) -> tuple[int, int]:
    """Width of a slice of the gated side and how many there are."""
    width = min(pad(plan.R), configs.TILE_COLUMNS)
    return width, triton.cdiv(plan.R, width)


def tile_gradients(
    r, p, y, x, write, gate, decays: Decays, dr, dgate, scale, first: int, cu_seqlens, plan: Plan, chunks: Chunks
) -> torch.Tensor:
    """Writes their part of `dr` (unless None) and `dgate`; returns that of the gradient of w y in fp32."""
    B, T = y.shape[:2]
    tiles = find_chunks(B, T, plan.tile, cu_seqlens)
    dy = torch.empty(y.shape, dtype=torch.float32, device=y.device)
    width, slices = tile_slices(plan)
    launch(
        tile_kernel, (tiles.count * plan.heads, slices),
        r, p, y, x, write, gate, decays.pairs, dr, dy, dgate, tiles.bounds, T, tiles.per_sequence, plan.heads,
        plan.heads * plan.group, plan.group, scale, *plan.sizes, plan.group_tiles, width,
        min(pad(plan.X), configs.TILE_COLUMNS), dgate.shape[-1], first, STORE_DR=dr is not None,
        **plan.options(chunks, write), **configs.options(configs.TILES, plan, plan.rows),
    )  # fmt: skip
    return dy
