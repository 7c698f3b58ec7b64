"""States at chunk boundaries: every chunk's own contribution in parallel, then one scan over chunks.

A state is stored as [chunks, H, M, D + V], K's columns first, so both states share every launch.
"""

import torch
import triton
import triton.language as tl

from ...triton_chunks import Chunks, Numerics, ceil_div, dot, load_rows, own_chunk
from ...triton_launch import launch
from .common import Blocks
from .decays import chunk_decays, load_suffix, load_weight


@triton.jit
def local_state_kernel(
    k, v, decays, states, bounds, T, NC, H, P,
    D: tl.constexpr, V: tl.constexpr, M: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr,
    BM: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    PACKED: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """One (chunk, piece): what its tokens leave in an empty state."""
    c, h, start, stop, _ = own_chunk(bounds, T, NC, C, H, PACKED)
    if stop <= start:
        return
    i = tl.arange(0, C)
    m = tl.arange(0, BM)
    token = (start + i) * (H // P) + h // P
    valid = (start + i) < stop
    decays = chunk_decays(decays, start, h, H, M, LOG_C)
    w = load_weight(decays, i, valid, m, H, M, LOG_C)
    w = (w * load_suffix(decays, LOG_C, i, valid, m, H, M, LOG_C)).to(CT)
    where = c.to(tl.int64) * H + h
    base = states + where * (M * (D + V)) + m[:, None] * (D + V)
    BD: tl.constexpr = KEY if PREC == "ieee" else min(KEY, 32)
    BV: tl.constexpr = VALUE if PREC == "ieee" else min(VALUE, 32)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        state = tl.trans(dot(tl.trans(load_rows(k, token, valid, D, d, CT)), w, CT, PREC))
        tl.store(base + d[None, :], state, mask=(m < M)[:, None] & (d < D)[None, :])
    for d0 in range(0, V, BV):
        d = d0 + tl.arange(0, BV)
        state = tl.trans(dot(tl.trans(load_rows(v, token, valid, V, d, CT)), w, CT, PREC))
        tl.store(base + D + d[None, :], state, mask=(m < M)[:, None] & (d < V)[None, :])


@triton.jit
def scan_kernel(
    states, gamma, in_k, in_v, out_k, out_v, first, NC, H, E,
    D: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr,
    PACKED: tl.constexpr, REVERSE: tl.constexpr, HAS_IN: tl.constexpr, HAS_OUT: tl.constexpr,
):  # fmt: skip
    """One (sequence, head) and BLOCK of the E = M (D + V) elements: replaces each chunk's contribution by the state at
    its start (or, in reverse, its gradient by the gradient at its end). Carried in fp32."""
    n = tl.program_id(0) // H
    h = tl.program_id(0) - n * H
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m = e // (D + V)
    col = e - m * (D + V)
    inside = e < E
    is_k = inside & (col < D)
    is_v = inside & (col >= D)
    M = E // (D + V)
    row = (n.to(tl.int64) * H + h) * M + m
    if PACKED:
        begin = tl.load(first + n)
        count = (tl.load(first + n + 1) - begin).to(tl.int32)
    else:
        begin = n.to(tl.int64) * NC
        count = NC
    state = tl.zeros([BLOCK], tl.float32)
    if HAS_IN:
        state = tl.load(in_k + row * D + col, mask=is_k, other=0.0).to(tl.float32)
        state += tl.load(in_v + row * V + (col - D), mask=is_v, other=0.0).to(tl.float32)
    # Four chunks are in flight at a time: the loads of one round do not wait for each other.
    for j in range(0, count, 4):
        c0 = begin + (count - 1 - j if REVERSE else j)
        step = -1 if REVERSE else 1
        p0 = (c0 * H + h) * E
        p1 = p0 + step * H * E.to(tl.int64)
        p2 = p1 + step * H * E.to(tl.int64)
        p3 = p2 + step * H * E.to(tl.int64)
        left = tl.zeros([BLOCK], tl.int32) + (count - j)
        b0 = inside
        b1 = inside & (left > 1)
        b2 = inside & (left > 2)
        b3 = inside & (left > 3)
        g0 = (c0 * H + h) * M + m
        x0 = tl.load(states + p0 + e, mask=b0, other=0.0).to(tl.float32)
        x1 = tl.load(states + p1 + e, mask=b1, other=0.0).to(tl.float32)
        x2 = tl.load(states + p2 + e, mask=b2, other=0.0).to(tl.float32)
        x3 = tl.load(states + p3 + e, mask=b3, other=0.0).to(tl.float32)
        y0 = tl.load(gamma + g0, mask=b0, other=1.0)
        y1 = tl.load(gamma + g0 + step * H * M, mask=b1, other=1.0)
        y2 = tl.load(gamma + g0 + 2 * step * H * M, mask=b2, other=1.0)
        y3 = tl.load(gamma + g0 + 3 * step * H * M, mask=b3, other=1.0)
        tl.store(states + p0 + e, state, mask=b0)
        state = state * y0 + x0
        tl.store(states + p1 + e, state, mask=b1)
        state = state * y1 + x1
        tl.store(states + p2 + e, state, mask=b2)
        state = state * y2 + x2
        tl.store(states + p3 + e, state, mask=b3)
        state = state * y3 + x3
    if HAS_OUT:
        tl.store(out_k + row * D + col, state, mask=is_k)
        tl.store(out_v + row * V + (col - D), state, mask=is_v)


def scan(states, gamma, incoming, outgoing, chunks: Chunks, D: int, V: int, *, reverse: bool) -> None:
    """Turns contributions [chunks, H, M, D + V] into running states in place; see `scan_kernel`."""
    H, E = states.shape[1], states.shape[2] * states.shape[3]
    block = 256
    in_k, in_v = incoming or (states, states)
    out_k, out_v = outgoing or (states, states)
    launch(
        scan_kernel, (chunks.sequences * H, ceil_div(E, block), 1),
        states, gamma, in_k, in_v, out_k, out_v, chunks.first, chunks.per_sequence, H, E, D, V, block,
        chunks.first is not None, reverse, incoming is not None, outgoing is not None,
        num_warps=4,
    )  # fmt: skip


def chunk_states(k, v, decays, gamma, initial, final, chunks: Chunks, blocks: Blocks, numerics: Numerics):
    """States at the start of every chunk [chunks, H, M, D + V], by `chunk_tables`.

    H counts pieces of heads (`walk.py`). `initial` and `final` are pairs of [N, H, M, D] and [N, H, M, V] or None;
    `final` is written.
    """
    T, (_, H, M) = k.shape[1], gamma.shape
    D, V = k.shape[-1], v.shape[-1]
    states = torch.empty(chunks.count, H, M, D + V, dtype=numerics.store, device=k.device)
    launch(
        local_state_kernel, (chunks.count * H, 1, 1),
        k, v, decays, states, chunks.bounds, T, chunks.per_sequence, H, H // k.shape[2],
        D, V, M, blocks.chunk, blocks.chunk.bit_length() - 1, blocks.slots, blocks.key, blocks.value,
        PACKED=chunks.bounds is not None, CT=numerics.operand, PREC=numerics.precision,
        num_warps=4,
    )  # fmt: skip
    scan(states, gamma, initial, final, chunks, D, V, reverse=False)
    return states
