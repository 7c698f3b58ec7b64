"""The fast path in bf16, in tiles of 16 tokens: how decays are factored, and the states at tile and segment boundaries.

Inside a tile one factor per (row, slot) serves the state and all earlier tokens at once: the decay of the state is
2^(SHIFT + L[t]) * 2^-SHIFT, beside the factored decay of pairs (`t2r_kernels/triton_chunks.py`, which says what that
keeps of a gate that forgets). The state carried to the next tile is decayed by the gate as it is.

A tile is known by the number (first token) // 16 + (its sequence), which is unique whatever the documents' lengths.

Slots beyond what one program holds go in pieces (`pieces.py`). To these kernels each piece is a head of its own that
shares its keys, values and queries with its neighbours: h counts pieces, H of them in all, M the slots of one, and
h // P is the key/value head. What has slots is laid out by pieces: gates [B, T, H, M], rows of scores
[B, T, HQ * P, M].
"""

import functools

import torch
import triton
import triton.language as tl

from ...triton_chunks import (
    SHIFT,
    STEP,
    Chunks,
    ceil_div,
    find_chunks,
    masked_sum,
    own_chunk,
    pad,
    power_of_two,
    row_offsets,
    split,
)
from ...triton_launch import launch
from . import configs
from .common import load_log2_alpha, write_weight
from .states import scan

TILE = tl.constexpr(16)
TINY = tl.constexpr(2.0**-104)
TINY_BITS = tl.constexpr(23 << 7)  # TINY in bf16, of which Triton makes 0 where it is written as a number


@functools.cache
def most_slots(HQ: int, H: int, D: int, V: int, dtype: torch.dtype) -> int:
    """How many slots a piece may have on the fast path, 0 where it does not take these sizes: both states of a head fit
    into the registers of one program, and the tiles of 64 rows (128 for groups beyond four heads) by slots beside them.
    """
    group, width = HQ // H, pad(D) + pad(V)
    if dtype != torch.bfloat16 or group > 8 or width > 1024:
        return 0
    return min(1 << (64 * 256 // width).bit_length() - 1, 128 if group <= 4 else 64)


@functools.cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def segment_length(tokens: int, programs: int, device: torch.device, each: int) -> int:
    """Tokens of a segment, where every segment takes `programs` programs and `each` of them fit a multiprocessor.

    As long as one launch still fills the device, but at least 64: a segment costs two states of traffic.
    """
    segments = max(1, each * processors(device) // programs)
    return max(64, ceil_div(ceil_div(tokens, segments), 16) * 16)


@triton.jit
def times_tiny(x, CT: tl.constexpr):
    """x of type CT times 2^-SHIFT, which rounds nothing."""
    if tl.bfloat16 == CT:
        tiny = tl.full([1, 1], TINY_BITS, tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        tiny = TINY
    return x * tiny


@triton.jit
def read_factors(x, w, t, CT: tl.constexpr):
    """2^(SHIFT + L[t]) for rows [len(t), BM], and 2^(-SHIFT - L[i]) [16, BM]; both fp32."""
    SPLIT: tl.constexpr = tl.bfloat16 == CT
    i = tl.arange(0, TILE)
    high, low = split(tl.maximum(x, STEP), SPLIT)
    row = tl.exp2(masked_sum(i[None, :] <= t[:, None], high, low, SPLIT, "ieee") + SHIFT)
    key = tl.exp2(-(masked_sum(i[None, :] <= i[:, None], high, low, SPLIT, "ieee") + SHIFT))
    return row, key


@triton.jit
def rest_of_tile(x, CT: tl.constexpr):
    """Decay from after each token to the tile's end, [16, BM] in fp32."""
    SPLIT: tl.constexpr = tl.bfloat16 == CT
    i = tl.arange(0, TILE)
    high, low = split(x, SPLIT)
    return tl.exp2(masked_sum(i[None, :] > i[:, None], high, low, SPLIT, "ieee"))


@triton.jit
def gates_kernel(
    log_alpha, operands, gamma, bounds, T, NC, H,
    M: tl.constexpr, BM: tl.constexpr, PACKED: tl.constexpr, PARTS: tl.constexpr, CT: tl.constexpr,
):  # fmt: skip
    """What the walks need of log alpha, ready as `operands` [B, T, H, PARTS, M]: the token's weight at the tile's end
    and, where PARTS is 4, the two factors of `read_factors`, the second times w, the first as a sum of two bf16
    numbers. Per tile its decay, gamma."""
    _c, h, start, stop, n = own_chunk(bounds, T, NC, TILE, H, PACKED)
    if stop <= start:
        return
    i = tl.arange(0, TILE)
    m = tl.arange(0, BM)
    x = load_log2_alpha(log_alpha, start, stop, h, H, M, TILE, BM)
    w = write_weight(x)
    cell = operands + ((start + i) * H + h)[:, None] * (PARTS * M) + m[None, :]
    mask = ((start + i) < stop)[:, None] & (m < M)[None, :]
    tl.store(cell, w * rest_of_tile(x, CT), mask=mask)
    tl.store(gamma + ((start // TILE + n) * H + h) * M + m, tl.exp2(tl.sum(x, 0)), mask=m < M)
    if PARTS == 4:
        row, key = read_factors(x, w, i, CT)
        high = row.to(CT)
        tl.store(cell + M, w * key, mask=mask)
        tl.store(cell + 2 * M, high, mask=mask)
        tl.store(cell + 3 * M, row - high.to(tl.float32), mask=mask)


@triton.jit
def walk_columns(
    x, y, gamma, states, tiles, col, start, stop, n, c, h, H, HX, G, P,
    WIDTH: tl.constexpr, E: tl.constexpr, SIDE: tl.constexpr, M: tl.constexpr, STRIDE: tl.constexpr,
    BG: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr, EMPTY: tl.constexpr,
    TILES: tl.constexpr, CT: tl.constexpr,
):  # fmt: skip
    """Columns [col, col + BLOCK) of K's (SIDE 0) or V's part of the state, over one segment."""
    m = tl.arange(0, BM)
    d = col + tl.arange(0, BLOCK)
    mask = (m < M)[:, None] & (d < WIDTH)[None, :]
    cell = m[:, None] * E + SIDE + d[None, :]
    where = (c.to(tl.int64) * H + h) * (M * E)
    if EMPTY:
        state = tl.zeros([BM, BLOCK], tl.float32)
    else:
        state = tl.load(states + where + cell, mask=mask, other=0.0)
    count = ((stop - start + TILE - 1) // TILE).to(tl.int32)
    for step in range(count):
        j = (count - 1 - step) if REVERSE else step
        _, row, valid = row_offsets(start + j * TILE, stop, h // P, 0, HX, G, TILE, BG)
        _, at, _ = row_offsets(start + j * TILE, stop, h, 0, HX * P, G, TILE, BG)
        xb = tl.load(x + at[:, None] * STRIDE + m[None, :], mask=valid[:, None] & (m < M)[None, :], other=0.0).to(CT)
        yb = tl.load(y + row[:, None] * WIDTH + d[None, :], mask=valid[:, None] & (d < WIDTH)[None, :], other=0.0)
        tile = (start // TILE + n + j) * H + h
        decay = tl.load(gamma + tile * M + m, mask=m < M, other=1.0)
        if TILES:
            tl.store(tiles + tile * (M * E) + cell, state, mask=mask)
        state = tl.dot(tl.trans(xb), yb.to(CT), state * decay[:, None], input_precision="ieee")
    if not TILES:
        tl.store(states + where + cell, state, mask=mask)


@triton.jit
def walk_states_kernel(
    xk, yk, xv, yv, gamma, states, total, tiles, bounds, T, NS, S, H, HX, G, P,
    D: tl.constexpr, V: tl.constexpr, M: tl.constexpr, STRIDE: tl.constexpr, BG: tl.constexpr,
    BM: tl.constexpr, BLOCK: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr, EMPTY: tl.constexpr,
    TILES: tl.constexpr, CT: tl.constexpr,
):  # fmt: skip
    """One (segment, head) and slice of columns of state <- gamma state + x^T y over the segment's tiles, in reverse for
    gradients. Rows of x are STRIDE apart. With TILES it stores the state that each tile meets; else what the segment
    leaves, and its decay."""
    c, h, start, stop, n = own_chunk(bounds, T, NS, S, H, PACKED)
    if stop <= start:
        return
    slice_ = tl.program_id(1)
    slices: tl.constexpr = (D + BLOCK - 1) // BLOCK
    if slice_ < slices:
        walk_columns(
            xk, yk, gamma, states, tiles, slice_ * BLOCK, start, stop, n, c, h, H, HX, G, P, D, D + V, 0, M, STRIDE,
            BG, BM, BLOCK, REVERSE, EMPTY, TILES, CT,
        )  # fmt: skip
    else:
        walk_columns(
            xv, yv, gamma, states, tiles, (slice_ - slices) * BLOCK, start, stop, n, c, h, H, HX, G, P, V, D + V, D,
            M, STRIDE, BG, BM, BLOCK, REVERSE, EMPTY, TILES, CT,
        )  # fmt: skip
    if (not TILES) and slice_ == 0:
        m = tl.arange(0, BM)
        decay = tl.full([BM], 1.0, tl.float32)
        first = (start // TILE + n) * H + h
        for j in range(((stop - start + TILE - 1) // TILE).to(tl.int32)):
            decay *= tl.load(gamma + (first + j * H) * M + m, mask=m < M, other=1.0)
        tl.store(total + (c.to(tl.int64) * H + h) * M + m, decay, mask=m < M)


class Walk:
    """Both states of one problem, walked along all sequences: forward for writes, in reverse for gradients."""

    def __init__(self, log_alpha, pieces: int, D: int, V: int, cu_seqlens, operand, parts: int):
        B, T, H, M = log_alpha.shape
        self.pieces = pieces
        self.D, self.V, self.M, self.H, self.T, self.B = D, V, M, H, T, B
        self.operand, self.cu_seqlens, self.device = operand, cu_seqlens, log_alpha.device
        self.store = torch.bfloat16 if operand == tl.bfloat16 else torch.float32
        self.tiles = find_chunks(B, T, 16, cu_seqlens)
        self.tile_count = B * T // 16 + self.tiles.sequences
        self.gamma = torch.empty(self.tile_count, H, M, dtype=torch.float32, device=self.device)
        self.operands = torch.empty(B, T, H, parts, M, dtype=self.store, device=self.device)
        launch(
            gates_kernel, (self.tiles.count * H, 1, 1),
            log_alpha, self.operands, self.gamma, self.tiles.bounds, T, self.tiles.per_sequence, H, M, pad(M),
            cu_seqlens is not None, parts, operand, num_warps=2,
        )  # fmt: skip

    def segments(self, length: int) -> Chunks:
        return find_chunks(self.B, self.T, length, self.cu_seqlens)

    def slices(self) -> tuple[int, int]:
        """Width of a slice of the states' columns, and how many there are."""
        block = min(configs.STATE_COLUMNS, max(pad(self.D), pad(self.V)))
        return block, ceil_div(self.D, block) + ceil_div(self.V, block)

    def _launch(self, pairs, states, total, tiles, segments, length, group, reverse, empty):
        (xk, yk), (xv, yv) = pairs
        block, slices = self.slices()
        rows = 16 * power_of_two(group)
        options = dict(configs.STATES)
        # Both branches of the kernel (K, V) hold their own stages in shared memory, of which a program gets 227 KiB.
        while options["num_stages"] > 1 and 4 * options["num_stages"] * rows * (pad(self.M) + block) > 2**17 * 1.7:
            options["num_stages"] -= 1
        launch(
            walk_states_kernel, (segments.count * self.H, slices, 1),
            xk, yk, xv, yv, self.gamma, states, total, tiles, segments.bounds, self.T, segments.per_sequence, length,
            self.H, self.H // self.pieces * group, group, self.pieces, self.D, self.V, self.M, xk.stride(2),
            rows // 16, pad(self.M), block,
            segments.bounds is not None, reverse, empty, tiles is not None, self.operand, **options,
        )  # fmt: skip

    def segment_states(self, pairs, incoming, outgoing, segments, length, *, group: int = 1, reverse: bool = False):
        """fp32 [segments, H, M, D + V]: the state that each segment meets; None where every sequence is one segment
        that starts empty and whose end nobody wants. `pairs` are (x, y) of K and of V; see `walk_states_kernel`."""
        if incoming is None and outgoing is None and segments.bounds is None and segments.per_sequence == 1:
            return None
        shape = (segments.count, self.H, self.M)
        states = torch.empty(*shape, self.D + self.V, dtype=torch.float32, device=self.device)
        total = torch.empty(*shape, dtype=torch.float32, device=self.device)
        self._launch(pairs, states, total, None, segments, length, group, reverse, True)
        scan(states, total, incoming, outgoing, segments, self.D, self.V, reverse=reverse)
        return states

    def starts(self, pairs, incoming, outgoing, slices: int, each: int, *, group: int = 1, reverse: bool = False):
        """(states that segments meet or None, segments, their length) for a walk by one program per (segment, head,
        slice), of which `each` fit a multiprocessor."""
        programs = self.H * slices * (1 if self.cu_seqlens is not None else self.B)
        # Without segments one pass does; they pay where the device would stand half empty.
        filled = 2 * programs >= processors(self.device) and self.cu_seqlens is None
        length = self.T if filled else segment_length(self.T, programs, self.device, each)
        segments = self.segments(length)
        states = self.segment_states(pairs, incoming, outgoing, segments, length, group=group, reverse=reverse)
        return states, segments, length

    def tile_states(self, pairs, incoming):
        """[tiles, H, M, D + V] in the operand's type: the state at each tile's start."""
        states, segments, length = self.starts(pairs, incoming, None, self.slices()[1], configs.STATE_PROGRAMS)
        tiles = torch.empty(self.tile_count, self.H, self.M, self.D + self.V, dtype=self.store, device=self.device)
        self._launch(pairs, states, None, tiles, segments, length, 1, False, states is None)
        return tiles
