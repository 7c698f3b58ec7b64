"""States [chunks, H, R, X] at chunk boundaries: each chunk's own contribution in parallel, then one scan over chunks.

The gradients of the states are the same sums in reverse, of what is read instead of what is written.
"""

import torch
import triton
import triton.language as tl

from ...triton_chunks import Chunks, add_dot, load_rows, own_chunk, pad, row_offsets
from ...triton_launch import launch
from . import configs
from .common import Plan, advance, load_decay, load_gate, load_total
from .decays import Decays


@triton.jit
def read_back(
    dstate, r, p, before, first, stop, h, H, HQ, G, d, e,
    R: tl.constexpr, X: tl.constexpr, SUB: tl.constexpr, BG: tl.constexpr, GROUP_TILES: tl.constexpr,
    KIND: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """The gradient of the state [rows d, columns e] before a tile, from that after it, both without the scale."""
    total = load_total(before, tl.minimum(first + SUB, stop) - 1, h, H, d, R, KIND)
    dstate = dstate * total[:, None]
    for tile in range(GROUP_TILES):
        t, row, valid = row_offsets(first, stop, h, tile * BG, HQ, G, SUB, BG)
        until = load_decay(before, first + t, valid, h, H, d, R, KIND)
        rb = load_rows(r, row, valid, R, d, CT).to(tl.float32)
        pb = load_rows(p, row, valid, X, e, CT)
        dstate = add_dot(dstate, tl.trans((rb * until).to(CT)), pb, CT, PREC)
    return dstate


@triton.jit
def chunk_kernel(
    left, right, write, gate, before, after, states, gamma, bounds, T, NC, H, HQ, G, scale,
    R: tl.constexpr, X: tl.constexpr, SUB: tl.constexpr, LOG_SUB: tl.constexpr, BG: tl.constexpr,
    C: tl.constexpr, GROUP_TILES: tl.constexpr, BR: tl.constexpr, BX: tl.constexpr, READS: tl.constexpr,
    PACKED: tl.constexpr, KIND: tl.constexpr, WEIGHTED: tl.constexpr, CT: tl.constexpr, SPLIT: tl.constexpr,
    PREC: tl.constexpr, EXACT: tl.constexpr, FACTORED: tl.constexpr,
):  # fmt: skip
    """One (chunk, head) and part of its state: what the chunk's writes leave in an empty state and its total decay
    gamma [chunks, H, R]; or with READS the gradient that its reads give to the state before it."""
    c, h, start, stop, _ = own_chunk(bounds, T, NC, C, H, PACKED)
    if stop <= start:
        return
    d = tl.program_id(1) * BR + tl.arange(0, BR)
    e = tl.program_id(2) * BX + tl.arange(0, BX)
    state = tl.zeros([BR, BX], tl.float32)
    count = ((stop - start + SUB - 1) // SUB).to(tl.int32)
    for step in tl.range(count, disable_licm=True):
        if READS:
            state = read_back(
                state, left, right, before, start + (count - 1 - step) * SUB, stop, h, H, HQ, G, d, e,
                R, X, SUB, BG, GROUP_TILES, KIND, CT, PREC,
            )  # fmt: skip
        else:
            state = advance(
                state, left, right, write, before, after, start + step * SUB, stop, h, H, d, e,
                R, X, SUB, False, KIND, WEIGHTED, CT, PREC,
            )  # fmt: skip
    if READS:
        state *= scale
    where = c.to(tl.int64) * H + h
    mask = (d < R)[:, None] & (e < X)[None, :]
    tl.store(states + where * (R * X) + d[:, None] * X + e[None, :], state, mask=mask)
    if (not READS) and tl.program_id(2) == 0:
        total = tl.zeros([SUB, BR], tl.float32)
        for step in range(count):
            total += load_gate(gate, start + step * SUB, stop, h, H, d, R, SUB, KIND)
        tl.store(gamma + where * R + d, tl.exp2(tl.sum(total, 0)), mask=d < R)


@triton.jit
def scan_kernel(
    states, gamma, incoming, outgoing, first, NC, H, STRIDE_R, STRIDE_X,
    R: tl.constexpr, X: tl.constexpr, BLOCK: tl.constexpr,
    PACKED: tl.constexpr, REVERSE: tl.constexpr, HAS_IN: tl.constexpr, HAS_OUT: tl.constexpr,
):  # fmt: skip
    """One (sequence, head) and BLOCK elements: replaces each chunk's contribution by the state at its start (or, in
    reverse, its gradient by the gradient at its end). Carried in fp32."""
    n = tl.program_id(0) // H
    h = tl.program_id(0) - n * H
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = e < R * X
    d = e // X
    outside = (n.to(tl.int64) * H + h) * (R * X) + d * STRIDE_R + (e - d * X) * STRIDE_X
    if PACKED:
        begin = tl.load(first + n)
        count = (tl.load(first + n + 1) - begin).to(tl.int32)
    else:
        begin = n.to(tl.int64) * NC
        count = NC
    state = tl.zeros([BLOCK], tl.float32)
    if HAS_IN:
        state = tl.load(incoming + outside, mask=inside, other=0.0).to(tl.float32)
    # Four chunks are in flight at a time: the loads of one round do not wait for each other.
    for j in range(0, count, 4):
        sign = -1 if REVERSE else 1
        c0 = (begin + (count - 1 - j if REVERSE else j)) * H + h
        c1 = c0 + sign * H
        c2 = c1 + sign * H
        c3 = c2 + sign * H
        left = tl.zeros([BLOCK], tl.int32) + (count - j)
        b1 = inside & (left > 1)
        b2 = inside & (left > 2)
        b3 = inside & (left > 3)
        x0 = tl.load(states + c0 * (R * X) + e, mask=inside, other=0.0).to(tl.float32)
        x1 = tl.load(states + c1 * (R * X) + e, mask=b1, other=0.0).to(tl.float32)
        x2 = tl.load(states + c2 * (R * X) + e, mask=b2, other=0.0).to(tl.float32)
        x3 = tl.load(states + c3 * (R * X) + e, mask=b3, other=0.0).to(tl.float32)
        y0 = tl.load(gamma + c0 * R + d, mask=inside, other=1.0)
        y1 = tl.load(gamma + c1 * R + d, mask=b1, other=1.0)
        y2 = tl.load(gamma + c2 * R + d, mask=b2, other=1.0)
        y3 = tl.load(gamma + c3 * R + d, mask=b3, other=1.0)
        tl.store(states + c0 * (R * X) + e, state, mask=inside)
        state = state * y0 + x0
        tl.store(states + c1 * (R * X) + e, state, mask=b1)
        state = state * y1 + x1
        tl.store(states + c2 * (R * X) + e, state, mask=b2)
        state = state * y2 + x2
        tl.store(states + c3 * (R * X) + e, state, mask=b3)
        state = state * y3 + x3
    if HAS_OUT:
        tl.store(outgoing + outside, state, mask=inside)


def _scan(states, gamma, incoming, outgoing, plan: Plan, chunks: Chunks, swapped: bool, reverse: bool) -> None:
    """`incoming` and `outgoing` are [N, H, D, V], whose rows are the state's columns where the gate is on V."""
    block = 256
    strides = (1, plan.R) if swapped else (plan.X, 1)
    launch(
        scan_kernel, (chunks.sequences * plan.heads, triton.cdiv(plan.R * plan.X, block)),
        states, gamma, incoming, outgoing, chunks.first, chunks.per_sequence, plan.heads, *strides, plan.R, plan.X,
        block, PACKED=chunks.first is not None, REVERSE=reverse, HAS_IN=incoming is not None,
        HAS_OUT=outgoing is not None, num_warps=4,
    )  # fmt: skip


def _empty(plan: Plan, chunks: Chunks, device) -> torch.Tensor:
    return torch.empty(chunks.count, plan.heads, plan.R, plan.X, dtype=plan.numerics.store, device=device)


def _launch(
    left, right, write, gate, decays: Decays, states, gamma, scale, plan: Plan, chunks: Chunks, chunk: int, reads: bool
):
    rows = min(pad(plan.R), 64 if plan.numerics.store == torch.float32 else 128)
    config = configs.READS if reads else configs.WRITES
    columns, slices, _ = configs.fit(config, plan, plan.X, rows)
    options = configs.options(config, plan, rows)
    grid = (chunks.count * plan.heads, triton.cdiv(plan.R, rows), slices)
    launch(
        chunk_kernel, grid,
        left, right, write, gate, decays.before, decays.after, states, gamma, chunks.bounds, left.shape[1],
        chunks.per_sequence, plan.heads,
        plan.heads * plan.group, plan.group, scale, *plan.sizes, chunk, plan.group_tiles, rows, columns, READS=reads,
        **plan.options(chunks, write), **options,
    )  # fmt: skip


def states_of(y, x, write, gate, decays: Decays, initial, final, plan: Plan, chunks: Chunks, chunk: int, swapped: bool):
    """States at the start of every chunk, decays of whole chunks [chunks, H, R] in fp32; writes `final` if given."""
    states = _empty(plan, chunks, y.device)
    gamma = torch.empty(chunks.count, plan.heads, plan.R, dtype=torch.float32, device=y.device)
    _launch(y, x, write, gate, decays, states, gamma, 1.0, plan, chunks, chunk, reads=False)
    _scan(states, gamma, initial, final, plan, chunks, swapped, reverse=False)
    return states, gamma


def gradients_of(
    r, p, decays: Decays, gamma, scale, dfinal, dinitial, plan: Plan, chunks: Chunks, chunk: int, swapped: bool
):
    """Gradients of the states at the end of every chunk; writes `dinitial` if given."""
    dstates = _empty(plan, chunks, r.device)
    _launch(r, p, None, None, decays, dstates, gamma, scale, plan, chunks, chunk, reads=True)
    _scan(dstates, gamma, dfinal, dinitial, plan, chunks, swapped, reverse=True)
    return dstates
