"""The backward pass, from the inputs and the upstream gradients alone.

States at chunk starts and their gradients at chunk ends come first (`states.py`); then two kernels walk every chunk in
reverse, tile by tile, with the gradient of the state in registers.

`gated_gradient_kernel`: dr, dy and the gradients of gate and write weights, for a slice of the gated side. It needs the
state at each tile's start too and rebuilds it from the chunk's.

The gradient of log alpha[t] is alpha_t times the flow that crosses token t: over all pairs (write before t, read at or
after t). It is summed class by class (state to state, state to tile, tile to state, and each level of the tile's tree),
each term carrying its own decay across t. No difference of long sums is formed, so a gate that forgets gets the small
gradient that it has and not the rounding of a large one.

`plain_gradient_kernel`: dx, for a slice of the plain side.
"""

import torch
import triton
import triton.language as tl

from ...gsa.triton.common import (
    Chunks,
    chunk_range,
    dot,
    load_rows,
    pairs_at,
    prefix_decay,
    row_offsets,
    split,
    suffix_decay,
)
from . import launch
from .common import (
    NONE,
    ROWS,
    SCALAR,
    Plan,
    add_dot,
    advance,
    load_gate,
    load_state,
    load_weight,
    pad,
    pair_decay,
    tile_decays,
    to_rows,
)
from .pairs import load_pairs


@triton.jit
def tile_gradient(
    rb, yb, b, x, t, d, dy, flow,
    LOG_SUB: tl.constexpr, BG: tl.constexpr, KIND: tl.constexpr, CT: tl.constexpr, SPLIT: tl.constexpr,
    PREC: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Pairs of one tile, given b[row, i] = p_t . x_i and rb in fp32: dr [rows, BR]; and added to what came in, d(w y)
    [SUB, BR] and what crosses each token [SUB, BR] (for a scalar gate summed over d and kept in the column d = 0)."""
    i = tl.arange(0, x.shape[0])
    if KIND == ROWS:
        high, low = split(x, SPLIT)
        same = tl.where(t[:, None] == i[None, :], b, 0.0).to(CT)
        dr = dot(same, yb, CT, PREC)
        dy = add_dot(dy, tl.trans(same), rb, CT, PREC)
        for level in range(LOG_SUB):
            right = to_rows(prefix_decay(i, i, high, low, level, SPLIT, EXACT), BG)
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
    else:
        pairs = b * pair_decay(x, BG, KIND, SPLIT, EXACT)
        dr = dot(pairs, yb, CT, PREC)
        dy = add_dot(dy, tl.trans(pairs.to(CT)), rb, CT, PREC)
        if KIND == SCALAR:
            terms = pairs * dot(rb, tl.trans(yb), CT, PREC)
            later = dot(tl.where(t[None, :] >= i[:, None], 1.0, 0.0), terms, CT, PREC)
            crossing = tl.sum(tl.where(i[None, :] < i[:, None], later, 0.0), 1)
            flow += tl.where((d == 0)[None, :], crossing[:, None], 0.0)
    return dr, dy, flow


@triton.jit
def gated_gradient_kernel(
    r, p, y, x, write, gate, states, dstates, dr, dy, dgate, dwrite, bounds, T, NC, H, HQ, G, scale,
    R: tl.constexpr, X: tl.constexpr, SUB: tl.constexpr, LOG_SUB: tl.constexpr, BG: tl.constexpr,
    C: tl.constexpr, GROUP_TILES: tl.constexpr, BR: tl.constexpr, BX: tl.constexpr, STORE_DR: tl.constexpr,
    PACKED: tl.constexpr, KIND: tl.constexpr, WEIGHTED: tl.constexpr, CT: tl.constexpr, SPLIT: tl.constexpr,
    PREC: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One (chunk, head) and slice of the gated side. Gradients of a gate or weight per head leave it as one part per
    slice, [B, T, H, slices]."""
    c = tl.program_id(0) // H
    h = tl.program_id(0) - c * H
    start, stop, _ = chunk_range(bounds, c, T, NC, C, PACKED)
    if stop <= start:
        return
    part = tl.program_id(1)
    parts: tl.constexpr = (R + BR - 1) // BR
    i = tl.arange(0, SUB)
    k = tl.arange(0, BR)
    d = part * BR + k
    e = tl.arange(0, BX)
    dstate = load_state(dstates, c, h, H, d, e, R, X, True)
    count = ((stop - start + SUB - 1) // SUB).to(tl.int32)
    for step in range(count):
        tile = count - 1 - step
        first = start + tile * SUB
        token = (first + i) * H + h
        valid = (first + i) < stop
        state = load_state(states, c, h, H, d, e, R, X, True)
        for j in range(tile):
            state = advance(
                state, y, x, write, gate, start + j * SUB, stop, h, H, d, e,
                R, X, SUB, LOG_SUB, True, KIND, WEIGHTED, CT, SPLIT, PREC, EXACT,
            )  # fmt: skip
        g = load_gate(gate, first, stop, h, H, d, R, SUB, KIND)
        before, after, total = tile_decays(g, LOG_SUB, KIND, SPLIT, EXACT)
        unweighted = load_rows(y, token, valid, R, d, tl.float32)
        yb = unweighted
        if WEIGHTED:
            w = load_weight(write, first, stop, h, H, d, R, SUB, KIND)
            yb = unweighted * w
        xb = load_rows(x, token, valid, X, e, CT)
        sb = state.to(CT)
        db = dstate.to(CT)
        dyb = dot(xb, db, CT, PREC) * after
        # Writes before the tile or in it that are read after it.
        flow = dot(tl.where(i[None, :] < i[:, None], 1.0, 0.0), yb * dyb, CT, PREC)
        flow += (tl.sum(state * dstate, 0) * total)[None, :]
        dstate = dstate * total[None, :]
        for group in range(GROUP_TILES):
            t, row, row_valid = row_offsets(first, stop, h, group * BG, HQ, G, SUB, BG)
            rb = load_rows(r, row, row_valid, R, d, tl.float32) * scale
            pb = load_rows(p, row, row_valid, X, e, CT)
            before_rows = to_rows(before, BG)
            got = dot(pb, sb, CT, PREC) * before_rows
            if KIND != NONE:
                flow = add_dot(flow, tl.where(t[None, :] >= i[:, None], 1.0, 0.0), rb * got, CT, PREC)
            b = dot(pb, tl.trans(xb), CT, PREC)
            drb, dyb, flow = tile_gradient(
                rb, yb, b, g, t, k, dyb, flow, LOG_SUB, BG, KIND, CT, SPLIT, PREC, EXACT
            )  # fmt: skip
            if STORE_DR:
                mask = row_valid[:, None] & (d < R)[None, :]
                tl.store(dr + row[:, None] * R + d[None, :], scale * (drb + got), mask=mask)
            dstate = add_dot(dstate, tl.trans(pb), rb * before_rows, CT, PREC)
        cell = token[:, None] * R + d[None, :]
        mask = valid[:, None] & (d < R)[None, :]
        if KIND == ROWS:
            tl.store(dgate + cell, flow, mask=mask)
        elif KIND == SCALAR:
            tl.store(dgate + token * parts + part, tl.sum(flow, 1), mask=valid)
        if WEIGHTED:
            if KIND == ROWS:
                tl.store(dwrite + cell, unweighted * dyb, mask=mask)
            else:
                tl.store(dwrite + token * parts + part, tl.sum(unweighted * dyb, 1), mask=valid)
            dyb *= w
        tl.store(dy + cell, dyb, mask=mask)


@triton.jit
def plain_gradient_kernel(
    r, p, y, write, gate, pairs, dstates, dx, bounds, T, NC, H, HQ, G, scale,
    R: tl.constexpr, X: tl.constexpr, SUB: tl.constexpr, LOG_SUB: tl.constexpr, BG: tl.constexpr,
    C: tl.constexpr, GROUP_TILES: tl.constexpr, BR: tl.constexpr, BX: tl.constexpr,
    PACKED: tl.constexpr, KIND: tl.constexpr, WEIGHTED: tl.constexpr, CT: tl.constexpr, SPLIT: tl.constexpr,
    PREC: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """dx of one (chunk, head) and slice of the plain side, summed over the group."""
    c = tl.program_id(0) // H
    h = tl.program_id(0) - c * H
    start, stop, _ = chunk_range(bounds, c, T, NC, C, PACKED)
    if stop <= start:
        return
    i = tl.arange(0, SUB)
    d = tl.arange(0, BR)
    e = tl.program_id(1) * BX + tl.arange(0, BX)
    dstate = load_state(dstates, c, h, H, d, e, R, X, False)
    count = ((stop - start + SUB - 1) // SUB).to(tl.int32)
    for step in range(count):
        first = start + (count - 1 - step) * SUB
        token = (first + i) * H + h
        valid = (first + i) < stop
        g = load_gate(gate, first, stop, h, H, d, R, SUB, KIND)
        before, after, total = tile_decays(g, LOG_SUB, KIND, SPLIT, EXACT)
        yb = load_rows(y, token, valid, R, d, tl.float32)
        if WEIGHTED:
            yb *= load_weight(write, first, stop, h, H, d, R, SUB, KIND)
        dxb = dot(yb * after, dstate, CT, PREC)
        dstate = dstate * total[:, None]
        for group in range(GROUP_TILES):
            _t, row, row_valid = row_offsets(first, stop, h, group * BG, HQ, G, SUB, BG)
            rb = load_rows(r, row, row_valid, R, d, CT)
            pb = load_rows(p, row, row_valid, X, e, CT)
            a = load_pairs(pairs, rb, yb, g, row, row_valid, scale, SUB, BG, KIND, CT, SPLIT, PREC, EXACT)
            reads = rb.to(tl.float32) * to_rows(before * scale, BG)
            dxb = add_dot(dxb, tl.trans(a.to(CT)), pb, CT, PREC)
            dstate = add_dot(dstate, tl.trans(reads.to(CT)), pb, CT, PREC)
        tl.store(dx + token[:, None] * X + e[None, :], dxb, mask=valid[:, None] & (e < X)[None, :])


def gated_gradients(r, p, y, x, write, gate, states, dstates, scale, want_dr, plan: Plan, chunks: Chunks, chunk: int):
    """dr (or None), dy, and the gradients of gate and write weights in fp32 (or None)."""
    B, T, H = y.shape[:3]
    width, slices, options = launch.fit(launch.GATED_GRADIENT, plan, plan.R, plan.X)
    dr, dy = torch.empty_like(r) if want_dr else None, torch.empty_like(y)
    shape = (B, T, H, plan.R if plan.kind == ROWS.value else slices)
    dgate, dwrite = (
        None if z is None else torch.empty(shape, dtype=torch.float32, device=y.device) for z in (gate, write)
    )
    gated_gradient_kernel[(chunks.count * H, slices)](
        r, p, y, x, write, gate, states, dstates, dr, dy, dgate, dwrite, chunks.bounds, T, chunks.per_sequence, H,
        H * plan.group, plan.group, scale, *plan.sizes, chunk, plan.group_tiles, width, pad(plan.X), STORE_DR=want_dr,
        **plan.options(chunks, write), **options,
    )  # fmt: skip
    if plan.kind != ROWS.value:
        dgate, dwrite = (z if z is None else z[..., 0] if slices == 1 else z.sum(-1) for z in (dgate, dwrite))
    return dr, dy, dgate, dwrite


def plain_gradient(r, p, y, x, write, gate, pairs, dstates, scale, plan: Plan, chunks: Chunks, chunk: int):
    """dx."""
    dx = torch.empty_like(x)
    width, slices, options = launch.fit(launch.PLAIN_GRADIENT, plan, plan.X, plan.R)
    plain_gradient_kernel[(chunks.count * plan.heads, slices)](
        r, p, y, write, gate, pairs, dstates, dx, chunks.bounds, y.shape[1], chunks.per_sequence, plan.heads,
        plan.heads * plan.group, plan.group, scale, *plan.sizes, chunk, plan.group_tiles, pad(plan.R), width,
        **plan.options(chunks, write), **options,
    )  # fmt: skip
    return dx
