"""Decays inside a tile, formed once and read by every kernel.

For the state: from the tile's start through each token (`before`) and from after it to the tile's end (`after`), each
exp2 of a sum of non-positive numbers, so that nothing overflows or cancels and a gate of exactly zero forgets exactly.

For pairs of tokens (i, t), where every row of the state has a decay of its own, there are two ways:

- **tree**: D(i, t) is a decay to the end of i's block times one from the start of t's. Exact for every gate; one
  product for each level of the tree.
- **factored** (bf16): one product for all pairs; what a gate stronger than 2^-13 forgets is kept at 2^-13 of its weight
  for pairs within a tile, and the states forget it exactly.

Both are explained in `t2r_kernels/triton_chunks.py`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton_chunks import (
    FLOOR,
    SHIFT,
    STEP,
    dot,
    find_chunks,
    masked_sum,
    own_chunk,
    pad,
    prefix_decay,
    split,
    suffix_decay,
)
from ...triton_launch import launch
from .common import NONE, ROWS, SCALAR, Plan, load_decay, load_gate

COLUMNS = 128
SCALAR_STEP = -64.0  # a gate per head needs no factors; 2^-64 of anything is nothing beside bf16


class Decays(NamedTuple):
    """[B, T, H, R] like the gate, fp16 (which keeps 11 bits of numbers in [0, 1]) beside bf16 operands and else fp32.
    `pairs` is what the kernels for pairs read: the sums L in fp32 where decays are factored, else the gate."""

    before: Tensor | None
    after: Tensor | None
    pairs: Tensor | None


@triton.jit
def decay_kernel(
    gate, before, after, sums, bounds, T, NC, H,
    R: tl.constexpr, SUB: tl.constexpr, LOG_SUB: tl.constexpr, BR: tl.constexpr, STEPS: tl.constexpr,
    PACKED: tl.constexpr, SPLIT: tl.constexpr, EXACT: tl.constexpr, FACTORED: tl.constexpr,
):  # fmt: skip
    """One (tile, head) and slice of the gate's columns."""
    _c, h, start, stop, _ = own_chunk(bounds, T, NC, SUB, H, PACKED)
    if stop <= start:
        return
    i = tl.arange(0, SUB)
    d = tl.program_id(1) * BR + tl.arange(0, BR)
    x = load_gate(gate, start, stop, h, H, d, R, SUB, ROWS)
    high, low = split(x, SPLIT)
    cell = ((start + i) * H + h)[:, None] * R + d[None, :]
    mask = ((start + i) < stop)[:, None] & (d < R)[None, :]
    tl.store(before + cell, prefix_decay(i, i, high, low, LOG_SUB, SPLIT, EXACT), mask=mask)
    tl.store(after + cell, suffix_decay(i, high, low, LOG_SUB, SPLIT, EXACT), mask=mask)
    if FACTORED:
        high, low = split(tl.maximum(x, STEPS), SPLIT)
        tl.store(sums + cell, masked_sum(i[None, :] <= i[:, None], high, low, SPLIT, EXACT), mask=mask)


@triton.jit
def pair_factors(sums, token, row_token, valid, row_valid, h, H, r, R: tl.constexpr):
    """2^(SHIFT + L) of the rows' tokens [rows, len(r)], and 2^(-SHIFT - L) of the tile's tokens [SUB, len(r)]."""
    row = tl.exp2(load_decay(sums, row_token, row_valid, h, H, r, R, ROWS) + SHIFT)
    key = tl.exp2(-(load_decay(sums, token, valid, h, H, r, R, ROWS) + SHIFT))
    return row, key


@triton.jit
def pair_decay(
    pairs, first, stop, t, h, H,
    SUB: tl.constexpr, KIND: tl.constexpr, SPLIT: tl.constexpr, EXACT: tl.constexpr, FACTORED: tl.constexpr,
):  # fmt: skip
    """D(i, t) of a gate whose rows are alike for rows of tokens t, [len(t), SUB]; 0 where i > t."""
    i = tl.arange(0, SUB)
    causal = i[None, :] <= t[:, None]
    if KIND == NONE:
        decay = tl.where(causal, 1.0, 0.0)
    elif FACTORED:
        # Sums of at most 16 numbers above SCALAR_STEP: their difference is good to 2^-12, beyond bf16.
        valid = first + t < stop
        row = load_decay(pairs, first + t, valid, h, H, t, 1, SCALAR)
        key = load_decay(pairs, first + i, first + i < stop, h, H, i, 1, SCALAR)
        decay = tl.where(causal & valid[:, None], tl.exp2(row - tl.trans(key)), 0.0)
    else:
        # The exponent is the sum of x_j over i < j <= t, as a product of [x_j if j <= t] and [1 if j > i].
        x = tl.load(pairs + (first + i) * H + h, mask=first + i < stop, other=0.0).to(tl.float32)
        x = tl.maximum(x * 1.4426950408889634, FLOOR)
        high, low = split(tl.where(i[None, :] <= t[:, None], x[None, :], 0.0), SPLIT)
        after = tl.where(i[:, None] > i[None, :], 1.0, 0.0)
        if SPLIT:
            exponent = tl.dot(low, after.to(tl.bfloat16), tl.dot(high, after.to(tl.bfloat16)))
        else:
            exponent = dot(high, after, tl.float32, EXACT)
        decay = tl.where(causal, tl.exp2(exponent), 0.0)
    return decay


def decays_of(gate: Tensor | None, cu_seqlens: Tensor | None, plan: Plan) -> Decays:
    """For log alpha [B, T, H, R], or [B, T, H] where rows are alike; Nones without a gate."""
    if gate is None:
        return Decays(None, None, None)
    dtype = torch.float32 if plan.numerics.store == torch.float32 else torch.float16
    before, after = (torch.empty(gate.shape, dtype=dtype, device=gate.device) for _ in range(2))
    sums = torch.empty(gate.shape, dtype=torch.float32, device=gate.device) if plan.factored else None
    B, T, H = gate.shape[:3]
    tiles = find_chunks(B, T, plan.tile, cu_seqlens)
    # A gate per head is one of which every head is a column.
    heads, width = (H, plan.R) if plan.kind == ROWS.value else (1, H)
    columns = min(pad(width), COLUMNS)
    launch(
        decay_kernel, (tiles.count * heads, triton.cdiv(width, columns)),
        gate, before, after, sums, tiles.bounds, T, tiles.per_sequence, heads, width, plan.tile,
        plan.tile.bit_length() - 1, columns, STEP.value if plan.kind == ROWS.value else SCALAR_STEP,
        PACKED=tiles.bounds is not None, SPLIT=plan.numerics.split, EXACT=plan.numerics.exact,
        FACTORED=plan.factored, num_warps=2,
    )  # fmt: skip
    return Decays(before, after, sums if plan.factored else gate)
