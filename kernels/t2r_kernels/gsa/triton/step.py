"""One decode step: the states are read once, updated in place and used by every query head of the group.

A step is a copy of the states with a little arithmetic, so what counts is bytes in flight and that nothing waits for
anything else. A program is one warp, in teams of `lanes` threads. A team has some slots of its own in every slice of
the states, which stream through registers, and a running softmax over them; the teams meet once, at the end, in
registers (warps would meet in shared memory, where bank conflicts cost a seventh of the whole step).

Registers hold two slices, which is all that a program can have under way. Where programs are too few to keep memory
busy so, slices further ahead are fetched into the L2 cache, which costs no register.

The shape of the tiles says which thread holds what: a thread gets the last dimension, and lanes are dealt out from the
first on (`places` sees to that). Here it is [lanes, teams, slots, heads, blocks, 4]: a team has whole rows of a state,
a score is a sum over lanes, and what follows from the scores is where the rows of V are: nothing else moves between
threads.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton_chunks import LOG2E, ceil_div, power_of_two
from ...triton_launch import launch
from .common import write_weight
from .walk import processors

WARP = 32
VECTOR = tl.constexpr(4)  # neighbouring columns of one thread: 16 bytes
LOWEST = tl.constexpr(-1e30)  # running maximum before the first score; not -inf, whose difference would be NaN
LINE = tl.constexpr(32)  # numbers in a line of the cache
AHEAD = tl.constexpr(2048)  # numbers of each state from the slice in work to the one that is prefetched: two slices
FEW = 4  # programs for each multiprocessor, and fewer: with eight at a time prefetching costs a twentieth


@triton.jit
def columns(LANES: tl.constexpr, TEAMS: tl.constexpr, SLOTS: tl.constexpr, HEADS: tl.constexpr, BLOCKS: tl.constexpr):
    """Columns of a tile, at its full shape: what is loaded there comes as the tile lies."""
    first = tl.arange(0, BLOCKS)[None, :] * LANES + tl.arange(0, LANES)[:, None]
    d = first[:, None, None, None, :, None] * VECTOR + tl.arange(0, VECTOR)
    return tl.broadcast_to(d, LANES, TEAMS, SLOTS, HEADS, BLOCKS, VECTOR)


@triton.jit
def places(row, d, WIDTH: tl.constexpr):
    """Offsets of columns d in rows of WIDTH, told to Triton in a way that makes it deal lanes out to the first two
    dimensions: it ranks them by how contiguous offsets are, and breaks ties from the first on (3.6) or from the last on
    (3.9). Vectors come from the last dimension alone, so calling neighbours in others contiguous does nothing else."""
    return tl.max_contiguous(row * WIDTH + d, [2, 2, 1, 1, 1, VECTOR])


@triton.jit
def load_slice(state, slot, d, WIDTH: tl.constexpr, M: tl.constexpr):
    return tl.load(state + places(slot, d, WIDTH), mask=(slot < M) & (d < WIDTH), other=0.0)


@triton.jit
def prefetch(state, first, WIDTH: tl.constexpr, M: tl.constexpr, SLOTS: tl.constexpr):
    """Asks for `SLOTS` slots of a state, AHEAD of slot `first`, in the L2 cache."""
    line = tl.arange(0, triton.next_power_of_2(triton.cdiv(SLOTS * WIDTH, LINE))) * LINE
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [state + tl.minimum(first * WIDTH + AHEAD + line, M * WIDTH - 1)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def step_kernel(
    q, k, v, log_alpha, visible, state_k, state_v, o, H, HQ, G, scale_log2,
    D: tl.constexpr, V: tl.constexpr, M: tl.constexpr, BG: tl.constexpr, BLOCKS_K: tl.constexpr,
    BLOCKS_V: tl.constexpr, LIMITED: tl.constexpr, LANES: tl.constexpr, TEAMS: tl.constexpr, SLOTS: tl.constexpr,
    PREFETCH: tl.constexpr,
):  # fmt: skip
    """One (sequence, key/value head)."""
    pid = tl.program_id(0).to(tl.int64)
    b = pid // H
    h = pid - b * H
    log_alpha += pid * M
    state_k += pid * (M * D)
    state_v += pid * (M * V)
    row = b * HQ + h * G
    d = columns(LANES, TEAMS, SLOTS, 1, BLOCKS_K)
    e = columns(LANES, TEAMS, SLOTS, 1, BLOCKS_V)
    own = tl.arange(0, TEAMS)[:, None] * SLOTS + tl.arange(0, SLOTS)[None, :]
    slot = own[None, :, :, None, None, None]
    next_k = load_slice(state_k, slot, d, D, M)
    next_v = load_slice(state_v, slot, e, V, M)
    next_x = tl.load(log_alpha + slot, mask=slot < M, other=0.0)
    one = columns(LANES, TEAMS, 1, 1, BLOCKS_K)
    kb = tl.load(k + places(pid, one, D), mask=one < D, other=0.0).to(tl.float32)
    one = columns(LANES, TEAMS, 1, 1, BLOCKS_V)
    vb = tl.load(v + places(pid, one, V), mask=one < V, other=0.0).to(tl.float32)
    each = columns(LANES, TEAMS, 1, BG, BLOCKS_K)
    g = tl.arange(0, BG)[None, None, None, :, None, None]
    qb = tl.load(q + places(row + g, each, D), mask=(g < G) & (each < D), other=0.0).to(tl.float32)
    limit = M
    if LIMITED:
        limit = tl.load(visible + b).to(tl.int32)
    highest = tl.full([TEAMS, BG], LOWEST, tl.float32)
    total = tl.zeros([TEAMS, BG], tl.float32)
    acc = tl.zeros([LANES, TEAMS, BG, BLOCKS_V, VECTOR], tl.float32)
    for first in range(0, M, TEAMS * SLOTS):
        # Everything that memory must do for this slice and the next comes before what is computed from this one.
        m = first + slot
        after = m + TEAMS * SLOTS
        if PREFETCH:
            prefetch(state_k, first, D, M, TEAMS * SLOTS)
            prefetch(state_v, first, V, M, TEAMS * SLOTS)
        x = next_x.to(tl.float32) * 1.4426950408889634
        alpha = tl.exp2(x)
        w = write_weight(tl.maximum(x, -512.0))
        new_k = next_k * alpha + w * kb
        tl.store(state_k + places(m, d, D), new_k, mask=(m < M) & (d < D))
        next_k = load_slice(state_k, after, d, D, M)
        next_x = tl.load(log_alpha + after, mask=after < M, other=0.0)
        new_v = next_v * alpha + w * vb
        tl.store(state_v + places(m, e, V), new_v, mask=(m < M) & (e < V))
        next_v = load_slice(state_v, after, e, V, M)
        s = tl.sum(tl.sum(tl.sum(new_k * qb, 5), 4), 0) * scale_log2
        s = tl.where((first + own < limit)[:, :, None], s, float("-inf"))
        higher = tl.maximum(highest, tl.max(s, 1))
        p = tl.exp2(s - higher[:, None, :])
        fade = tl.exp2(highest - higher)
        total = total * fade + tl.sum(p, 1)
        highest = higher
        acc = acc * fade[None, :, :, None, None] + tl.sum(p[None, :, :, :, None, None] * new_v, 2)
    share = tl.exp2(highest - tl.max(highest, 0)[None, :])
    share = share / tl.sum(share * total, 0)[None, :]
    out = tl.sum(acc * share[None, :, :, None, None], 1)
    first = tl.arange(0, BLOCKS_V)[None, :] * LANES + tl.arange(0, LANES)[:, None]
    column = first[:, None, :, None] * VECTOR + tl.arange(0, VECTOR)
    head = tl.arange(0, BG)[None, :, None, None]
    tl.store(o + (row + head) * V + column, out, mask=(head < G) & (column < V))


@functools.cache
def layout(heads: int, D: int, V: int, M: int) -> tuple[int, int, int, int, int]:
    """Blocks of K and of V, lanes and teams, and the slots of a team in one slice: as many as registers allow.

    With 16 lanes instead of 32 a score takes fewer exchanges between lanes, and queries and output more registers.
    """
    lanes = 16 if max(D, V) <= 128 and heads <= 4 else 32
    blocks_k, blocks_v = (power_of_two(ceil_div(width, lanes * VECTOR.value)) for width in (D, V))
    blocks, teams = blocks_k + blocks_v, WARP // lanes
    slots = min(8, power_of_two(ceil_div(M, teams)))
    # Two slices of the states, queries and output, scores: 255 registers of a thread, less what addresses take.
    while slots > 1 and 8 * slots * blocks + 4 * heads * blocks + slots * heads > 208:
        slots //= 2
    return blocks_k, blocks_v, lanes, teams, slots


@functools.cache
def prefetches(programs: int, device: torch.device) -> bool:
    """Whether a step of so many programs prefetches: on NVIDIA's GPUs, whose instruction it is."""
    return device.type == "cuda" and torch.version.hip is None and programs <= FEW * processors(device)


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
    blocks_k, blocks_v, *teams = layout(heads, D, V, M)
    launch(
        step_kernel, (B * H, 1, 1),
        q, k, v, log_alpha, visible, state_k, state_v, o, H, HQ, HQ // H, scale * LOG2E, D, V, M, heads, blocks_k,
        blocks_v, visible is not None, *teams, prefetches(B * H, q.device), num_warps=1,
    )  # fmt: skip
    return o
