"""What the GSA kernels share: how a chunk is found, how decays are formed, and which block sizes are used.

**Decays.** Inside a chunk the decay from token i to token t is exp2 of the sum of log2 alpha over i+1..t. A pair (i, t)
is split at the boundary that a binary tree over the chunk puts between them: at level l the chunk is cut into blocks of
2^l tokens, and the pair belongs to the level at which i lies in an even (left) block and t in the odd (right) block
that follows it. There the decay is suffix(i) * prefix(t): suffix(i) over the rest of i's block, prefix(t) from the
start of t's block through t. Both exponents are sums of non-positive numbers: nothing overflows, nothing cancels, and
a gate of exactly zero forgets exactly, whatever stands beside it. The sums are products of a 0/1 matrix with log2 alpha
on the tensor cores: no cumulative sum is ever subtracted from another.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

LOG2E = 1.4426950408889634
# log2 alpha below this is as good as -inf (exp2 gives 0); -inf itself would make NaN of 0 * -inf in a product.
FLOOR = tl.constexpr(-512.0)


# triton.cdiv and triton.next_power_of_2 serve kernels too and cost microseconds in Python: a launch calls many.
def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The next one."""
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class Blocks:
    """Block sizes of one problem: every query head of a group shares a tile of `rows` = chunk * group rows."""

    chunk: int
    group: int  # query heads per tile, a power of two
    group_tiles: int
    slots: int  # M padded to a power of two, at least 16
    key: int  # width of a slice of D
    value: int
    warps: int
    stages: int

    @property
    def rows(self) -> int:
        return self.chunk * self.group


def choose_blocks(HQ: int, H: int, D: int, V: int, M: int, itemsize: int) -> Blocks:
    """The one configuration for these sizes. Rows are a multiple of 64, the height of a Hopper matrix instruction."""
    slots = max(16, power_of_two(M))
    rows = 128 if slots <= 64 and itemsize == 2 else 64
    if slots > 64 and itemsize == 4:
        rows = 32 if slots <= 128 else 16  # three tf32 passes over more would need more shared memory than there is
    group = min(power_of_two(HQ // H), rows // 16)
    chunk = min(64 if rows == 128 else 32, max(16, rows // group))
    width = 64 if itemsize == 2 else 32
    if slots > 128:
        width = 32
    return Blocks(
        chunk=chunk,
        group=group,
        group_tiles=ceil_div(HQ // H, group),
        slots=slots,
        key=min(width, max(16, power_of_two(D))),
        value=min(width, max(16, power_of_two(V))),
        warps=8 if chunk * group * slots >= 8192 or (slots > 64 and itemsize == 4) else 4,
        stages=2 if itemsize == 2 else 1,
    )


@dataclass(frozen=True)
class Numerics:
    """Types of one problem: `store` holds intermediates in memory, `operand` feeds the matrix units."""

    store: torch.dtype
    operand: tl.dtype
    split: bool  # log2 alpha goes through the matrix units as two bf16 terms, else as one fp32 term
    precision: str  # of an fp32 product of data
    exact: str  # of an fp32 product that must keep 24 bits


def choose_numerics(dtype: torch.dtype) -> Numerics:
    """bf16 stays bf16. fp32, and fp16 for its narrow range, are products of fp32 in three tf32 passes: a single pass
    truncates its operands to 10 bits and was seen to err by more than fp16 itself."""
    precision = "ieee" if torch.version.hip else "tf32x3"
    if dtype == torch.bfloat16:
        return Numerics(torch.bfloat16, tl.bfloat16, True, "ieee", precision)
    return Numerics(torch.float32, tl.float32, False, precision, precision)


@dataclass(frozen=True)
class Chunks:
    """Where each chunk lies. `bounds` is None for a dense batch; otherwise int64 [count, 3]: token range (empty for
    chunks that no document owns) and document; and `first` int64 [N + 1] is the first chunk of each document."""

    count: int
    sequences: int
    per_sequence: int
    bounds: torch.Tensor | None
    first: torch.Tensor | None


@functools.cache
def _dense_chunks(B: int, T: int, chunk: int) -> Chunks:
    per = ceil_div(T, chunk)
    return Chunks(B * per, B, per, None, None)


def find_chunks(B: int, T: int, chunk: int, cu_seqlens: torch.Tensor | None) -> Chunks:
    """Cuts every document into chunks without waiting for the device: the count is an upper bound for packed input."""
    if cu_seqlens is None:
        return _dense_chunks(B, T, chunk)
    N = cu_seqlens.numel() - 1
    cu = cu_seqlens.long()
    last = ((cu[1:] - cu[:-1] + (chunk - 1)) // chunk).cumsum(0)
    first = torch.cat([last.new_zeros(1), last])
    count = T // chunk + N
    index = torch.arange(count, device=cu.device)
    document = torch.searchsorted(last, index, right=True)
    owned = document < N
    document = document.clamp(max=N - 1)
    start = cu[document] + (index - first[document]) * chunk
    stop = torch.minimum(start + chunk, cu[document + 1])
    bounds = torch.stack([start, stop, document], 1) * owned[:, None]
    return Chunks(count, N, 0, bounds, first)


@triton.jit
def chunk_range(bounds, c, T, NC, C, PACKED: tl.constexpr):
    """First token of chunk c, one past its last (int64, of the flattened [B * T] tokens), and its sequence."""
    if PACKED:
        start = tl.load(bounds + 3 * c)
        stop = tl.load(bounds + 3 * c + 1)
        n = tl.load(bounds + 3 * c + 2)
    else:
        n = (c // NC).to(tl.int64)
        start = n * T + (c - c // NC * NC) * C
        stop = tl.minimum(start + C, (n + 1) * T)
    return start, stop, n


@triton.jit
def dot(a, b, CT: tl.constexpr, PREC: tl.constexpr):
    return tl.dot(a.to(CT), b.to(CT), input_precision=PREC)


@triton.jit
def load_log2_alpha(log_alpha, start, stop, h, H, M, C: tl.constexpr, BM: tl.constexpr):
    """log2 alpha of a chunk [C, BM]; tokens past the end and slots past M get alpha = 1, which writes nothing."""
    i = tl.arange(0, C)
    m = tl.arange(0, BM)
    inside = ((start + i) < stop)[:, None] & (m < M)[None, :]
    x = tl.load(log_alpha + ((start + i) * H + h)[:, None] * M + m[None, :], mask=inside, other=0.0).to(tl.float32)
    return tl.maximum(x * 1.4426950408889634, FLOOR)


@triton.jit
def write_weight(x):
    """1 - 2^x to full relative precision for x <= 0: the Taylor series of expm1 near 0, where 1 - exp2 would cancel."""
    y = x * 0.6931471805599453
    s = 1.0 + y / 2 * (1.0 + y / 3 * (1.0 + y / 4 * (1.0 + y / 5 * (1.0 + y / 6 * (1.0 + y / 7)))))
    return tl.where(y > -0.3, -y * s, 1.0 - tl.exp2(x))


@triton.jit
def split(x, SPLIT: tl.constexpr):
    """x as two operands for masked sums: bf16 high and low part (16 bits of mantissa in all), or x itself twice."""
    if SPLIT:
        high = x.to(tl.bfloat16)
        low = (x - high.to(tl.float32)).to(tl.bfloat16)
    else:
        high = x
        low = x
    return high, low


@triton.jit
def masked_sum(mask, high, low, SPLIT: tl.constexpr, EXACT: tl.constexpr):
    """mask [A, C] (0/1) times x [C, BM], accumulated in fp32."""
    if SPLIT:
        ones = mask.to(tl.bfloat16)
        total = tl.dot(ones, low, tl.dot(ones, high))
    else:
        total = tl.dot(mask.to(tl.float32), high, input_precision=EXACT)
    return total


@triton.jit
def prefix_decay(t, i, high, low, LEVEL, SPLIT: tl.constexpr, EXACT: tl.constexpr):
    """Decay from the start of t's block of 2^LEVEL tokens through t, [len(t), BM]."""
    mask = ((t >> LEVEL)[:, None] == (i >> LEVEL)[None, :]) & (i[None, :] <= t[:, None])
    return tl.exp2(masked_sum(mask, high, low, SPLIT, EXACT))


@triton.jit
def suffix_decay(i, high, low, LEVEL, SPLIT: tl.constexpr, EXACT: tl.constexpr):
    """Decay from after token i to the end of its block of 2^LEVEL tokens, [C, BM]."""
    mask = ((i >> LEVEL)[:, None] == (i >> LEVEL)[None, :]) & (i[None, :] > i[:, None])
    return tl.exp2(masked_sum(mask, high, low, SPLIT, EXACT))


@triton.jit
def pairs_at(t, i, LEVEL):
    """Pairs (t, i) that the tree separates at LEVEL: i in a left block, t in the right block beside it."""
    return ((t >> LEVEL)[:, None] == (i >> LEVEL)[None, :] + 1) & (((i >> LEVEL) & 1) == 0)[None, :]


@triton.jit
def row_offsets(start, stop, h, g0, HQ, G, C: tl.constexpr, BG: tl.constexpr):
    """A tile's rows are (token, query head), heads fastest: token in the chunk, row of [B * T * HQ], validity."""
    r = tl.arange(0, C * BG)
    t = r // BG
    g = g0 + r % BG
    return t, (start + t) * HQ + h * G + g, ((start + t) < stop) & (g < G)


@triton.jit
def load_rows(x, row, valid, width, d, CT: tl.constexpr):
    return tl.load(x + row[:, None] * width + d[None, :], mask=valid[:, None] & (d < width)[None, :], other=0.0).to(CT)


@triton.jit
def readable(visible, start, t, row_valid, m, M: tl.constexpr, LIMITED: tl.constexpr):
    """Which slots each row may read, [rows, BM]: all M, or with LIMITED the first visible[token]."""
    if LIMITED:
        limit = tl.load(visible + start + t, mask=row_valid, other=M)
        seen = m[None, :] < limit[:, None]
    else:
        seen = (m < M)[None, :] & (t >= 0)[:, None]
    return seen
