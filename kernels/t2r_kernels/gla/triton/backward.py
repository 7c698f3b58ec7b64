"""The backward pass, from the inputs and the upstream gradients alone.

States at chunk starts and their gradients at chunk ends come first (`states.py`); then two kernels walk every chunk in
reverse, tile by tile, with the gradient of the state in registers.

`gated_gradient_kernel`: dr, dy and the gradients of gate and write weights, for a slice of the gated side; what pairs
inside a tile give comes from `tiles.py`. It needs the state at each tile's start too and rebuilds it from the chunk's.

The gradient of log alpha[t] is alpha_t times the flow that crosses token t: over all pairs (write before t, read at or
after t). It is summed class by class (state to state, state to tile, tile to state, and each level of the tile's tree),
each term carrying its own decay across t. No difference of long sums is formed, so a gate that forgets gets the small
gradient that it has and not the rounding of a large one.

`plain_gradient_kernel`: dx, for a slice of the plain side.
"""

import torch
import triton
import triton.language as tl

from ...triton_chunks import Chunks, add_dot, dot, load_rows, own_chunk, pad, row_offsets
from ...triton_launch import launch
from . import configs
from .common import NONE, ROWS, SCALAR, Plan, advance, load_decay, load_state, load_total, load_weight
from .decays import Decays, pair_decay
from .pairs import load_pairs
from .tiles import alike_gradient, tile_gradients, tile_slices


@triton.jit
def gated_gradient_kernel(
    r, p, y, x, write, before, after, states, dstates, dr, dy_tiles, dy, dgate, dwrite, bounds, T, NC, H, HQ, G, scale,
    R: tl.constexpr, X: tl.constexpr, SUB: tl.constexpr, LOG_SUB: tl.constexpr, BG: tl.constexpr,
    C: tl.constexpr, GROUP_TILES: tl.constexpr, BR: tl.constexpr, BX: tl.constexpr, STORE_DR: tl.constexpr,
    GATE_PARTS: tl.constexpr, PACKED: tl.constexpr, KIND: tl.constexpr, WEIGHTED: tl.constexpr, CT: tl.constexpr,
    SPLIT: tl.constexpr, PREC: tl.constexpr, EXACT: tl.constexpr, FACTORED: tl.constexpr,
):  # fmt: skip
    """One (chunk, head) and slice of the gated side: adds to dr, dy_tiles and dgate what states take part in. Gradients
    of a gate or weight per head leave it as one part per slice."""
    c, h, start, stop, _ = own_chunk(bounds, T, NC, C, H, PACKED)
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
    for step in tl.range(count, disable_licm=True):
        tile = count - 1 - step
        first = start + tile * SUB
        token = (first + i) * H + h
        valid = (first + i) < stop
        state = load_state(states, c, h, H, d, e, R, X, True)
        for j in range(tile):
            state = advance(
                state, y, x, write, before, after, start + j * SUB, stop, h, H, d, e,
                R, X, SUB, True, KIND, WEIGHTED, CT, PREC,
            )  # fmt: skip
        rest = load_decay(after, first + i, valid, h, H, d, R, KIND)
        total = load_total(before, tl.minimum(first + SUB, stop) - 1, h, H, d, R, KIND)
        unweighted = load_rows(y, token, valid, R, d, tl.float32)
        yb = unweighted
        if WEIGHTED:
            w = load_weight(write, first, stop, h, H, d, R, SUB, KIND)
            yb = unweighted * w
        xb = load_rows(x, token, valid, X, e, CT)
        sb = state.to(CT)
        db = dstate.to(CT)
        dyb = dot(xb, db, CT, PREC) * rest
        # Writes before the tile or in it that are read after it.
        flow = dot(tl.where(i[None, :] < i[:, None], 1.0, 0.0), yb * dyb, CT, PREC)
        flow += (tl.sum(state * dstate, 0) * total)[None, :]
        dstate = dstate * total[None, :]
        for group in range(GROUP_TILES):
            t, row, row_valid = row_offsets(first, stop, h, group * BG, HQ, G, SUB, BG)
            rb = load_rows(r, row, row_valid, R, d, tl.float32) * scale
            pb = load_rows(p, row, row_valid, X, e, CT)
            until = load_decay(before, first + t, row_valid, h, H, d, R, KIND)
            got = dot(pb, sb, CT, PREC) * until
            if KIND != NONE:
                flow = add_dot(flow, tl.where(t[None, :] >= i[:, None], 1.0, 0.0), rb * got, CT, PREC)
            cell = row[:, None] * R + d[None, :]
            mask = row_valid[:, None] & (d < R)[None, :]
            if KIND == NONE:
                b = dot(pb, tl.trans(xb), CT, PREC)
                decay = pair_decay(before, first, stop, t, h, H, SUB, KIND, SPLIT, EXACT, FACTORED)
                drb, dyb, flow = alike_gradient(rb, yb, b, decay, t, k, dyb, flow, KIND, CT, PREC)
                drb = scale * (drb + got)
            elif STORE_DR:
                drb = tl.load(dr + cell, mask=mask, other=0.0).to(tl.float32) + scale * got
            if STORE_DR:
                tl.store(dr + cell, drb, mask=mask)
            dstate = add_dot(dstate, tl.trans(pb), rb * until, CT, PREC)
        at = token[:, None] * R + d[None, :]
        inside = valid[:, None] & (d < R)[None, :]
        if KIND == ROWS:
            tl.store(dgate + at, flow + tl.load(dgate + at, mask=inside, other=0.0), mask=inside)
        elif KIND == SCALAR:
            tl.store(dgate + token * GATE_PARTS + part, tl.sum(flow, 1), mask=valid)
        if KIND != NONE:
            dyb += tl.load(dy_tiles + at, mask=inside, other=0.0)
        if WEIGHTED:
            if KIND == ROWS:
                tl.store(dwrite + at, unweighted * dyb, mask=inside)
            else:
                tl.store(dwrite + token * parts + part, tl.sum(unweighted * dyb, 1), mask=valid)
            dyb *= w
        tl.store(dy + at, dyb, mask=inside)


@triton.jit
def plain_gradient_kernel(
    r, p, y, write, decays, before, after, pairs, dstates, dx, bounds, T, NC, H, HQ, G, scale,
    R: tl.constexpr, X: tl.constexpr, SUB: tl.constexpr, LOG_SUB: tl.constexpr, BG: tl.constexpr,
    C: tl.constexpr, GROUP_TILES: tl.constexpr, BR: tl.constexpr, BX: tl.constexpr,
    PACKED: tl.constexpr, KIND: tl.constexpr, WEIGHTED: tl.constexpr, CT: tl.constexpr, SPLIT: tl.constexpr,
    PREC: tl.constexpr, EXACT: tl.constexpr, FACTORED: tl.constexpr,
):  # fmt: skip
    """dx of one (chunk, head) and slice of the plain side, summed over the group."""
    c, h, start, stop, _ = own_chunk(bounds, T, NC, C, H, PACKED)
    if stop <= start:
        return
    i = tl.arange(0, SUB)
    d = tl.arange(0, BR)
    e = tl.program_id(1) * BX + tl.arange(0, BX)
    dstate = load_state(dstates, c, h, H, d, e, R, X, False)
    count = ((stop - start + SUB - 1) // SUB).to(tl.int32)
    for step in tl.range(count, disable_licm=True):
        first = start + (count - 1 - step) * SUB
        token = (first + i) * H + h
        valid = (first + i) < stop
        rest = load_decay(after, first + i, valid, h, H, d, R, KIND)
        total = load_total(before, tl.minimum(first + SUB, stop) - 1, h, H, d, R, KIND)
        yb = load_rows(y, token, valid, R, d, tl.float32)
        if WEIGHTED:
            yb *= load_weight(write, first, stop, h, H, d, R, SUB, KIND)
        dxb = dot(yb * rest, dstate, CT, PREC)
        dstate = dstate * total[:, None]
        for group in range(GROUP_TILES):
            t, row, row_valid = row_offsets(first, stop, h, group * BG, HQ, G, SUB, BG)
            rb = load_rows(r, row, row_valid, R, d, CT)
            pb = load_rows(p, row, row_valid, X, e, CT)
            a = load_pairs(
                pairs, decays, rb, yb, first, stop, t, row, row_valid, h, H, scale,
                SUB, KIND, CT, SPLIT, PREC, EXACT, FACTORED,
            )  # fmt: skip
            reads = rb.to(tl.float32) * (load_decay(before, first + t, row_valid, h, H, d, R, KIND) * scale)
            dxb = add_dot(dxb, tl.trans(a.to(CT)), pb, CT, PREC)
            dstate = add_dot(dstate, tl.trans(reads.to(CT)), pb, CT, PREC)
        tl.store(dx + token[:, None] * X + e[None, :], dxb, mask=valid[:, None] & (e < X)[None, :])


def gated_gradients(
    r, p, y, x, write, gate, decays: Decays, states, dstates, scale, want_dr, cu_seqlens, plan: Plan, chunks: Chunks,
    chunk: int
):  # fmt: skip
    """dr (or None) and dy, and the gradients of gate and write weights in fp32 (or None)."""
    B, T, H = y.shape[:3]
    width, slices, options = configs.fit(configs.GATED_GRADIENT, plan, plan.R, plan.X)

    def small(given, parts):
        width = plan.R if plan.kind == ROWS.value else parts
        return None if given is None else torch.empty(B, T, H, width, dtype=torch.float32, device=y.device)

    dr, dy = torch.empty_like(r) if want_dr else None, torch.empty_like(y)
    gate_parts = slices + tile_slices(plan)[1]
    dgate, dwrite, dy_tiles = small(gate, gate_parts), small(write, slices), None
    if gate is not None:
        dy_tiles = tile_gradients(r, p, y, x, write, gate, decays, dr, dgate, scale, slices, cu_seqlens, plan, chunks)
    launch(
        gated_gradient_kernel, (chunks.count * H, slices),
        r, p, y, x, write, decays.before, decays.after, states, dstates, dr, dy_tiles, dy, dgate, dwrite,
        chunks.bounds, T,
        chunks.per_sequence, H, H * plan.group, plan.group, scale, *plan.sizes, chunk, plan.group_tiles, width,
        pad(plan.X), STORE_DR=want_dr, GATE_PARTS=gate_parts, **plan.options(chunks, write), **options,
    )  # fmt: skip
    if plan.kind != ROWS.value:
        dgate, dwrite = (z if z is None else z.sum(-1) for z in (dgate, dwrite))
    return dr, dy, dgate, dwrite


def plain_gradient(r, p, y, x, write, decays: Decays, pairs, dstates, scale, plan: Plan, chunks: Chunks, chunk: int):
    """dx."""
    dx = torch.empty_like(x)
    width, slices, options = configs.fit(configs.PLAIN_GRADIENT, plan, plan.X, plan.R)
    launch(
        plain_gradient_kernel, (chunks.count * plan.heads, slices),
        r, p, y, write, decays.pairs, decays.before, decays.after, pairs, dstates, dx, chunks.bounds, y.shape[1],
        chunks.per_sequence, plan.heads,
        plan.heads * plan.group, plan.group, scale, *plan.sizes, chunk, plan.group_tiles, pad(plan.R), width,
        **plan.options(chunks, write), **options,
    )  # fmt: skip
    return dx
