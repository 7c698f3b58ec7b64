"""One decode step: the states are read once, updated in place and used by every query head of the group.

A step is a copy of the states with a little arithmetic, so what counts is bytes in flight and that no warp waits for
another. Each warp has some slots of its own in every slice of the states, which stream through registers, and a running
softmax over them; the warps meet once, at the end. The shape of the tiles says which thread holds what, for Triton
gives a thread the last dimension and deals out lanes, then warps from the first on. Here it is [32 lanes, warps, slots,
heads, blocks, 4]: a warp has whole rows of a state (512 bytes at a time), a score is a sum over lanes, and what follows
from the scores is where the rows of V are: nothing moves between threads. (With eight lanes for a row there is a fourth
of the shuffles, but probabilities must then be handed on through shared memory, with a barrier for every slice.)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import LOG2E, ceil_div, power_of_two, write_weight
from .launch import launch

LANES = tl.constexpr(32)
VECTOR = tl.constexpr(4)  # neighbouring columns of one thread: 16 bytes
LOWEST = tl.constexpr(-1e30)  # running maximum before the first score; not -inf, whose difference would be NaN
WARPS = 2  # of one program; measured on one H200, where four or eight are slower at every batch from 64 on


@triton.jit
def columns(WARPS: tl.constexpr, SLOTS: tl.constexpr, HEADS: tl.constexpr, BLOCKS: tl.constexpr):
    """Columns of a tile, at its full shape: what is loaded there comes as the tile lies."""
    first = tl.arange(0, BLOCKS)[None, :] * LANES + tl.arange(0, LANES)[:, None]
    d = first[:, None, None, None, :, None] * VECTOR + tl.arange(0, VECTOR)
    return tl.broadcast_to(d, LANES, WARPS, SLOTS, HEADS, BLOCKS, VECTOR)


@triton.jit
def load_slice(state, slot, d, WIDTH: tl.constexpr, M: tl.constexpr):
    return tl.load(state + slot * WIDTH + d, mask=(slot < M) & (d < WIDTH), other=0.0)


@triton.jit
def step_kernel(
    q, k, v, log_alpha, visible, state_k, state_v, o, H, HQ, G, scale_log2,
    D: tl.constexpr, V: tl.constexpr, M: tl.constexpr, BG: tl.constexpr, BLOCKS_K: tl.constexpr,
    BLOCKS_V: tl.constexpr, LIMITED: tl.constexpr, WARPS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """One (sequence, key/value head)."""
    pid = tl.program_id(0).to(tl.int64)
    b = pid // H
    h = pid - b * H
    log_alpha += pid * M
    state_k += pid * (M * D)
    state_v += pid * (M * V)
    row = b * HQ + h * G
    d = columns(WARPS, SLOTS, 1, BLOCKS_K)
    e = columns(WARPS, SLOTS, 1, BLOCKS_V)
    own = tl.arange(0, WARPS)[:, None] * SLOTS + tl.arange(0, SLOTS)[None, :]
    slot = own[None, :, :, None, None, None]
    next_k = load_slice(state_k, slot, d, D, M)
    one = columns(WARPS, 1, 1, BLOCKS_K)
    kb = tl.load(k + pid * D + one, mask=one < D, other=0.0).to(tl.float32)
    one = columns(WARPS, 1, 1, BLOCKS_V)
    vb = tl.load(v + pid * V + one, mask=one < V, other=0.0).to(tl.float32)
    each = columns(WARPS, 1, BG, BLOCKS_K)
    g = tl.arange(0, BG)[None, None, None, :, None, None]
    qb = tl.load(q + (row + g) * D + each, mask=(g < G) & (each < D), other=0.0).to(tl.float32)
    limit = M
    if LIMITED:
        limit = tl.load(visible + b).to(tl.int32)
    highest = tl.full([WARPS, BG], LOWEST, tl.float32)
    total = tl.zeros([WARPS, BG], tl.float32)
    acc = tl.zeros([LANES, WARPS, BG, BLOCKS_V, VECTOR], tl.float32)
    for first in range(0, M, WARPS * SLOTS):
        m = first + slot
        after = m + WARPS * SLOTS
        old_k = next_k
        old_v = load_slice(state_v, m, e, V, M)  # while K is worked on; K's next slice while V is
        x = tl.load(log_alpha + m, mask=m < M, other=0.0).to(tl.float32) * 1.4426950408889634
        alpha = tl.exp2(x)
        w = write_weight(tl.maximum(x, -512.0))
        new_k = old_k * alpha + w * kb
        tl.store(state_k + m * D + d, new_k, mask=(m < M) & (d < D))
        s = tl.sum(tl.sum(tl.sum(new_k * qb, 5), 4), 0) * scale_log2
        s = tl.where((first + own < limit)[:, :, None], s, float("-inf"))
        higher = tl.maximum(highest, tl.max(s, 1))
        p = tl.exp2(s - higher[:, None, :])
        fade = tl.exp2(highest - higher)
        total = total * fade + tl.sum(p, 1)
        highest = higher
        next_k = load_slice(state_k, after, d, D, M)
        new_v = old_v * alpha + w * vb
        tl.store(state_v + m * V + e, new_v, mask=(m < M) & (e < V))
        acc = acc * fade[None, :, :, None, None] + tl.sum(p[None, :, :, :, None, None] * new_v, 2)
    share = tl.exp2(highest - tl.max(highest, 0)[None, :])
    share = share / tl.sum(share * total, 0)[None, :]
    out = tl.sum(acc * share[None, :, :, None, None], 1)
    first = tl.arange(0, BLOCKS_V)[None, :] * LANES + tl.arange(0, LANES)[:, None]
    column = first[:, None, :, None] * VECTOR + tl.arange(0, VECTOR)
    head = tl.arange(0, BG)[None, :, None, None]
    tl.store(o + (row + head) * V + column, out, mask=(head < G) & (column < V))


def slots_of_a_warp(heads: int, blocks: int) -> int:
    """In one slice: as many as registers allow beside the queries and the output of all heads."""
    return max(1, min(4, 32 // (heads * blocks)))


def gsa_step_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    state: tuple[Tensor, Tensor],
    scale: float,
    visible: Tensor | None = None,
) -> Tensor:
    """Shapes as in `t2r_kernels.gsa_step`. One launch, no synchronisation: usable inside a CUDA graph."""
    state_k, state_v = state
    for name, x in (("K", state_k), ("V", state_v)):
        if not x.is_contiguous():
            raise ValueError(
                f"gsa_step: state {name} has strides {x.stride()}, must be contiguous to be updated in place"
            )
    q, k, v, log_alpha = (x.contiguous() for x in (q, k, v, log_alpha))
    visible = None if visible is None else visible.contiguous()
    B, HQ, D = q.shape
    H, V, M = k.shape[1], v.shape[-1], log_alpha.shape[-1]
    o = torch.empty(B, HQ, V, dtype=q.dtype, device=q.device)
    heads = power_of_two(HQ // H)
    blocks = [power_of_two(ceil_div(width, 128)) for width in (D, V)]  # of 32 lanes with 4 columns
    launch(
        step_kernel, (B * H, 1, 1),
        q, k, v, log_alpha, visible, state_k, state_v, o, H, HQ, HQ // H, scale * LOG2E, D, V, M, heads, *blocks,
        visible is not None, WARPS, slots_of_a_warp(heads, sum(blocks)), num_warps=WARPS,
    )  # fmt: skip
    return o
