"""One decode step: the states are read once, updated in place and used by every query head of the group.

A step is a copy of the states with a little arithmetic, so what counts is bytes in flight and that nothing waits. The
states stream through registers in slices of 16 slots, with a running softmax over slots. The shapes of the tiles say
which thread holds what, for Triton gives a thread the last dimension and deals out lanes, then warps from the first on:
K's tile is [8 lanes, 4 lanes, 4 warps, heads, blocks, 4]: 8 lanes share the columns of a slot, so that a score is a sum
in the thread and three shuffles; V's tile is [32 lanes, 4 warps, 4 slots, heads, blocks, 4]: a warp has whole rows, so
that the sum over slots stays in the thread. Each warp has four slots of its own in every slice and a softmax of its
own; the warps meet once, at the end.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import LOG2E, ceil_div, power_of_two, write_weight

WARPS = tl.constexpr(4)
SLOTS = tl.constexpr(4)  # of one warp in one slice
LANES_K = tl.constexpr(8)  # that share one slot
LANES_V = tl.constexpr(32)
VECTOR = tl.constexpr(4)  # neighbouring columns of one thread: 16 bytes
LOWEST = tl.constexpr(-1e30)  # running maximum before the first score; not -inf, whose difference would be NaN


@triton.jit
def gate_of(log_alpha, slot, M: tl.constexpr):
    """alpha and w = 1 - alpha of these slots."""
    x = tl.load(log_alpha + slot, mask=slot < M, other=0.0).to(tl.float32) * 1.4426950408889634
    return tl.exp2(x), write_weight(tl.maximum(x, -512.0))


@triton.jit
def lane_columns(LANES: tl.constexpr, BLOCKS: tl.constexpr):
    """First of a thread's columns, [lane, block]."""
    return (tl.arange(0, BLOCKS)[None, :] * LANES + tl.arange(0, LANES)[:, None]) * VECTOR


@triton.jit
def step_kernel(
    q, k, v, log_alpha, visible, state_k, state_v, o, H, HQ, G, scale_log2,
    D: tl.constexpr, V: tl.constexpr, M: tl.constexpr, BG: tl.constexpr, BLOCKS_K: tl.constexpr,
    BLOCKS_V: tl.constexpr, LIMITED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One (sequence, key/value head)."""
    pid = tl.program_id(0).to(tl.int64)
    b = pid // H
    h = pid - b * H
    slot = tl.arange(0, SLOTS)
    warp = tl.arange(0, WARPS)
    vector = tl.arange(0, VECTOR)
    # What is smaller than a tile is loaded at the tile's shape, so that it comes as the tile lies.
    d = lane_columns(LANES_K, BLOCKS_K)[:, None, None, None, :, None] + vector
    d = tl.broadcast_to(d, LANES_K, SLOTS, WARPS, 1, BLOCKS_K, VECTOR)
    e = lane_columns(LANES_V, BLOCKS_V)[:, None, None, None, :, None] + vector
    e = tl.broadcast_to(e, LANES_V, WARPS, SLOTS, 1, BLOCKS_V, VECTOR)
    g = tl.broadcast_to(tl.arange(0, BG)[None, None, None, :, None, None], LANES_K, SLOTS, WARPS, BG, BLOCKS_K, VECTOR)
    slot_k = (warp[None, :] * SLOTS + slot[:, None])[None, :, :, None, None, None]
    slot_v = (warp[:, None] * SLOTS + slot[None, :])[None, :, :, None, None, None]
    log_alpha += pid * M
    state_k += pid * (M * D)
    state_v += pid * (M * V)
    row = b * HQ + h * G
    limit = M
    if LIMITED:
        limit = tl.load(visible + b).to(tl.int32)
    highest = tl.full([WARPS, BG], LOWEST, tl.float32)
    total = tl.zeros([WARPS, BG], tl.float32)
    acc = tl.zeros([LANES_V, WARPS, BG, BLOCKS_V, VECTOR], tl.float32)
    for first in tl.range(0, M, WARPS * SLOTS, num_stages=STAGES):
        mk = first + slot_k
        mv = first + slot_v
        mask_k = (mk < M) & (d < D)
        mask_v = (mv < M) & (e < V)
        old_k = tl.load(state_k + mk * D + d, mask=mask_k, other=0.0)
        old_v = tl.load(state_v + mv * V + e, mask=mask_v, other=0.0)
        kb = tl.load(k + pid * D + d, mask=d < D, other=0.0).to(tl.float32)
        qb = tl.load(q + (row + g) * D + d, mask=(g < G) & (d < D), other=0.0).to(tl.float32)
        alpha, w = gate_of(log_alpha, mk, M)
        new_k = old_k * alpha + w * kb
        tl.store(state_k + mk * D + d, new_k, mask=mask_k)
        s = tl.sum(tl.sum(tl.sum(new_k * qb, 5), 4), 0) * scale_log2
        seen = first + warp[None, :, None] * SLOTS + slot[:, None, None] < limit
        s = tl.where(seen, s, float("-inf"))
        higher = tl.maximum(highest, tl.max(s, 0))
        p = tl.exp2(s - higher[None, :, :])
        fade = tl.exp2(highest - higher)
        total = total * fade + tl.sum(p, 0)
        highest = higher
        vb = tl.load(v + pid * V + e, mask=e < V, other=0.0).to(tl.float32)
        alpha, w = gate_of(log_alpha, mv, M)
        new_v = old_v * alpha + w * vb
        tl.store(state_v + mv * V + e, new_v, mask=mask_v)
        weighted = tl.permute(p, (1, 0, 2))[None, :, :, :, None, None] * new_v
        acc = acc * fade[None, :, :, None, None] + tl.sum(weighted, 2)
    share = tl.exp2(highest - tl.max(highest, 0)[None, :])
    share = share / tl.sum(share * total, 0)[None, :]
    out = tl.sum(acc * share[None, :, :, None, None], 1)
    head = tl.arange(0, BG)[None, :, None, None]
    column = lane_columns(LANES_V, BLOCKS_V)[:, None, :, None] + vector
    tl.store(o + (row + head) * V + column, out, mask=(head < G) & (column < V))


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
    step_kernel[(B * H,)](
        q, k, v, log_alpha, visible, state_k, state_v, o, H, HQ, HQ // H, scale * LOG2E, D, V, M,
        power_of_two(HQ // H), *(
            power_of_two(ceil_div(width, lanes.value * VECTOR.value))
            for width, lanes in ((D, LANES_K), (V, LANES_V))
        ),
        LIMITED=visible is not None, STAGES=STAGES, num_warps=WARPS.value,
    )  # fmt: skip
    return o


STAGES = 1
