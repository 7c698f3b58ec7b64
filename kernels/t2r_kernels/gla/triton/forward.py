"""What is read: a program walks one chunk from the state at its start, tile by tile, with the state in registers.

`plain_kernel` reads into the plain side (o for a gate on the key side; dq for one on the value side), `gated_kernel`
into the gated side (o for a gate on the value side). Both serve all query heads of a group from one state.
"""

import torch
import triton
import triton.language as tl

from ...triton_chunks import (
    Chunks,
    add_dot,
    dot,
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
from .common import Plan, load_decay, load_gate, load_state, load_total, load_written
from .decays import Decays, pair_factors
from .pairs import load_pairs


@triton.jit
def plain_kernel(
    r, y, x, write, decays, before, after, pairs, states, out, bounds, T, NC, H, HQ, G, scale,
    R: tl.constexpr, X: tl.constexpr, SUB: tl.constexpr, LOG_SUB: tl.constexpr, BG: tl.constexpr,
    C: tl.constexpr, BR: tl.constexpr, BX: tl.constexpr,
    PACKED: tl.constexpr, KIND: tl.constexpr, WEIGHTED: tl.constexpr, CT: tl.constexpr, SPLIT: tl.constexpr,
    PREC: tl.constexpr, EXACT: tl.constexpr, FACTORED: tl.constexpr,
):  # fmt: skip
    """out [rows, X] of one (chunk, head), slice of columns and tile of the group: dL/dp."""
    c, h, start, stop, _ = own_chunk(bounds, T, NC, C, H, PACKED)
    if stop <= start:
        return
    d = tl.arange(0, BR)
    e = tl.program_id(1) * BX + tl.arange(0, BX)
    state = load_state(states, c, h, H, d, e, R, X, False)
    for tile in tl.range(((stop - start + SUB - 1) // SUB).to(tl.int32), disable_licm=True):
        first = start + tile * SUB
        token = first + tl.arange(0, SUB)
        t, row, valid = row_offsets(first, stop, h, tl.program_id(2) * BG, HQ, G, SUB, BG)
        rb = load_rows(r, row, valid, R, d, CT)
        yb = load_written(y, write, first, stop, h, H, d, R, SUB, KIND, WEIGHTED)
        xb = load_rows(x, token * H + h, token < stop, X, e, CT)
        until = load_decay(before, first + t, valid, h, H, d, R, KIND)
        rest = load_decay(after, token, token < stop, h, H, d, R, KIND)
        total = load_total(before, tl.minimum(first + SUB, stop) - 1, h, H, d, R, KIND)
        ob = dot(rb.to(tl.float32) * until, state, CT, PREC) * scale
        a = load_pairs(
            pairs, decays, rb, yb, first, stop, t, row, valid, h, H, scale, SUB, KIND, CT, SPLIT, PREC, EXACT, FACTORED
        )
        ob = add_dot(ob, a, xb, CT, PREC)
        tl.store(out + row[:, None] * X + e[None, :], ob, mask=valid[:, None] & (e < X)[None, :])
        state = add_dot(state * total[:, None], tl.trans((yb * rest).to(CT)), xb, CT, PREC)


@triton.jit
def gated_kernel(
    p, y, x, write, decays, before, after, pairs, states, out, bounds, T, NC, H, HQ, G, scale,
    R: tl.constexpr, X: tl.constexpr, SUB: tl.constexpr, LOG_SUB: tl.constexpr, BG: tl.constexpr,
    C: tl.constexpr, BR: tl.constexpr, BX: tl.constexpr,
    PACKED: tl.constexpr, KIND: tl.constexpr, WEIGHTED: tl.constexpr, CT: tl.constexpr, SPLIT: tl.constexpr,
    PREC: tl.constexpr, EXACT: tl.constexpr, FACTORED: tl.constexpr,
):  # fmt: skip
    """out [rows, R] of one (chunk, head), slice of the gated side and tile of the group: dL/dr."""
    c, h, start, stop, _ = own_chunk(bounds, T, NC, C, H, PACKED)
    if stop <= start:
        return
    i = tl.arange(0, SUB)
    d = tl.program_id(1) * BR + tl.arange(0, BR)
    e = tl.arange(0, BX)
    state = load_state(states, c, h, H, d, e, R, X, True)
    for tile in tl.range(((stop - start + SUB - 1) // SUB).to(tl.int32), disable_licm=True):
        first = start + tile * SUB
        token = first + i
        t, row, valid = row_offsets(first, stop, h, tl.program_id(2) * BG, HQ, G, SUB, BG)
        pb = load_rows(p, row, valid, X, e, CT)
        yb = load_written(y, write, first, stop, h, H, d, R, SUB, KIND, WEIGHTED)
        xb = load_rows(x, token * H + h, token < stop, X, e, CT)
        until = load_decay(before, first + t, valid, h, H, d, R, KIND)
        rest = load_decay(after, token, token < stop, h, H, d, R, KIND)
        total = load_total(before, tl.minimum(first + SUB, stop) - 1, h, H, d, R, KIND)
        ob = dot(pb, state, CT, PREC) * until
        b = dot(pb, tl.trans(xb), CT, PREC)
        if FACTORED:
            right, left = pair_factors(decays, token, first + t, token < stop, valid, h, H, d, R)
            ob += right * dot(tl.where(i[None, :] <= t[:, None], b, 0.0), yb * left, CT, PREC)
        else:
            ob = add_dot(ob, tl.where(t[:, None] == i[None, :], b, 0.0), yb, CT, PREC)
            high, low = split(load_gate(decays, first, stop, h, H, d, R, SUB, KIND), SPLIT)
            for level in range(LOG_SUB):
                left = yb * suffix_decay(i, high, low, level, SPLIT, EXACT)
                right = prefix_decay(t, i, high, low, level, SPLIT, EXACT)
                ob += dot(tl.where(pairs_at(t, i, level), b, 0.0), left, CT, PREC) * right
        tl.store(out + row[:, None] * R + d[None, :], ob * scale, mask=valid[:, None] & (d < R)[None, :])
        state = add_dot(state * total[None, :], tl.trans(xb), yb * rest, CT, PREC)


def _launch(
    kernel, a, y, x, write, decays: Decays, pairs, states, out, scale, plan: Plan, chunks: Chunks, chunk: int, widths,
    slices,
    options
):  # fmt: skip
    launch(
        kernel, (chunks.count * plan.heads, slices, plan.group_tiles),
        a, y, x, write, decays.pairs, decays.before, decays.after, pairs, states, out, chunks.bounds, y.shape[1],
        chunks.per_sequence, plan.heads,
        plan.heads * plan.group, plan.group, scale, *plan.sizes, chunk, *widths, **plan.options(chunks, write),
        **options,
    )  # fmt: skip


def read_plain(
    r, y, x, write, decays: Decays, pairs, states, scale, plan: Plan, chunks: Chunks, chunk: int
) -> torch.Tensor:
    """[B, T, HQ, X] in r's dtype: scale * sum over i <= t of (r_t . D(i, t) w_i y_i) x_i, from `states` on."""
    out = torch.empty(*r.shape[:3], plan.X, dtype=r.dtype, device=r.device)
    width, slices, options = configs.fit(configs.PLAIN, plan, plan.X, plan.R)
    widths = (pad(plan.R), width)
    _launch(
        plain_kernel, r, y, x, write, decays, pairs, states, out, scale, plan, chunks, chunk, widths, slices, options
    )
    return out


def read_gated(p, y, x, write, decays: Decays, states, scale, plan: Plan, chunks: Chunks, chunk: int) -> torch.Tensor:
    """[B, T, HQ, R] in p's dtype: scale * sum over i <= t of (p_t . x_i) D(i, t) w_i y_i, from `states` on."""
    out = torch.empty(*p.shape[:3], plan.R, dtype=p.dtype, device=p.device)
    width, slices, options = configs.fit(configs.GATED, plan, plan.R, plan.X)
    widths = (width, pad(plan.X))
    _launch(
        gated_kernel, p, y, x, write, decays, None, states, out, scale, plan, chunks, chunk, widths, slices, options
    )
    return out
