"""Scores of the pairs inside each tile, from the gated side alone; no state takes part, every tile is for itself."""

import torch
import triton
import triton.language as tl

from ...triton_chunks import (
    Chunks,
    add_dot,
    dot,
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
from .common import ROWS, Plan, load_gate, load_written
from .decays import Decays, pair_decay, pair_factors


@triton.jit
def pair_kernel(
    r, y, write, decays, pairs, bounds, T, NC, H, HQ, G, scale,
    R: tl.constexpr, X: tl.constexpr, SUB: tl.constexpr, LOG_SUB: tl.constexpr, BG: tl.constexpr,
    BR: tl.constexpr, PACKED: tl.constexpr, KIND: tl.constexpr, WEIGHTED: tl.constexpr, CT: tl.constexpr,
    SPLIT: tl.constexpr, PREC: tl.constexpr, EXACT: tl.constexpr, FACTORED: tl.constexpr,
):  # fmt: skip
    """scale * r_t . D(i, t) w_i y_i for the pairs i <= t of one (tile, head) and tile of the group, [rows, SUB]."""
    _c, h, start, stop, _ = own_chunk(bounds, T, NC, SUB, H, PACKED)
    if stop <= start:
        return
    i = tl.arange(0, SUB)
    t, row, valid = row_offsets(start, stop, h, tl.program_id(1) * BG, HQ, G, SUB, BG)
    a = tl.zeros([SUB * BG, SUB], tl.float32)
    for r0 in range(0, R, BR):
        d = r0 + tl.arange(0, BR)
        rb = load_rows(r, row, valid, R, d, CT)
        yb = load_written(y, write, start, stop, h, H, d, R, SUB, KIND, WEIGHTED)
        if FACTORED:
            right, left = pair_factors(decays, start + i, start + t, start + i < stop, valid, h, H, d, R)
            a = add_dot(a, rb.to(tl.float32) * right, tl.trans((yb * left).to(CT)), CT, PREC)
        else:
            high, low = split(load_gate(decays, start, stop, h, H, d, R, SUB, KIND), SPLIT)
            a += tl.where(t[:, None] == i[None, :], dot(rb, tl.trans(yb), CT, PREC), 0.0)
            for level in range(LOG_SUB):
                left = yb * suffix_decay(i, high, low, level, SPLIT, EXACT)
                right = rb.to(tl.float32) * prefix_decay(t, i, high, low, level, SPLIT, EXACT)
                a += tl.where(pairs_at(t, i, level), dot(right, tl.trans(left), CT, PREC), 0.0)
    a = tl.where(i[None, :] <= t[:, None], a, 0.0)
    tl.store(pairs + row[:, None] * SUB + i[None, :], a * scale, mask=valid[:, None] & (i >= 0)[None, :])


@triton.jit
def load_pairs(
    pairs, decays, rb, yb, first, stop, t, row, valid, h, H, scale,
    SUB: tl.constexpr, KIND: tl.constexpr, CT: tl.constexpr, SPLIT: tl.constexpr, PREC: tl.constexpr,
    EXACT: tl.constexpr, FACTORED: tl.constexpr,
):  # fmt: skip
    """The scores of a tile [rows, SUB]: from memory, or where one decay serves all rows of the state, on the spot."""
    i = tl.arange(0, SUB)
    if KIND == ROWS:
        a = tl.load(pairs + row[:, None] * SUB + i[None, :], mask=valid[:, None] & (i >= 0)[None, :], other=0.0)
    else:
        decay = pair_decay(decays, first, stop, t, h, H, SUB, KIND, SPLIT, EXACT, FACTORED)
        a = (dot(rb, tl.trans(yb), CT, PREC) * (decay * scale)).to(CT)
    return a


def pair_scores(r, y, write, decays: Decays, scale, cu_seqlens, plan: Plan, chunks: Chunks) -> torch.Tensor | None:
    """[B, T, HQ, tile] for a gate with rows of its own, else None; see `load_pairs`."""
    if plan.kind != ROWS.value:
        return None
    B, T, HQ, _ = r.shape
    tiles = find_chunks(B, T, plan.tile, cu_seqlens)
    pairs = torch.empty(B, T, HQ, plan.tile, dtype=plan.numerics.store, device=r.device)
    launch(
        pair_kernel, (tiles.count * plan.heads, plan.group_tiles),
        r, y, write, decays.pairs, pairs, tiles.bounds, T, tiles.per_sequence, plan.heads, HQ, plan.group, scale,
        *plan.sizes,
        min(pad(plan.R), configs.PAIR_COLUMNS), **plan.options(chunks, write),
        **configs.options(configs.PAIRS, plan, plan.rows),
    )  # fmt: skip
    return pairs
