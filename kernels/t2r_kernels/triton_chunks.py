"""What the Triton kernels of gsa and gla share: how a chunk is found, products, and how the decays in it are formed.

**By a tree, exact.** The decay from token i to token t is exp2 of the sum of log2 alpha over i+1..t. A pair (i, t) is
split at the boundary that a binary tree over the chunk puts between them: at level l the chunk is cut into blocks of
2^l tokens, and the pair belongs to the level at which i lies in an even (left) block and t in the odd (right) block
that follows it. There the decay is suffix(i) * prefix(t): suffix(i) over the rest of i's block, prefix(t) from the
start of t's block through t. Both exponents are sums of non-positive numbers: nothing overflows, nothing cancels, and
a gate of exactly zero forgets exactly, whatever stands beside it. The sums are products of a 0/1 matrix with log2 alpha
on the tensor cores: no cumulative sum is ever subtracted from another.

**Factored, for bf16 and tiles of 16 tokens.** With L[t] the sum of log2 alpha from the tile's start through t, the
decay from i to t is 2^(SHIFT + L[t]) * 2^(-SHIFT - L[i]): one product for all pairs of a tile. Each step of log2 alpha
is floored at STEP for this, so that L >= -208 and both factors stay within 2^+-104, inside the range of bf16: an old
entry that a stronger gate forgets is kept at 2^-13 of its weight until the tile ends, below the 2^-9 to which bf16
rounds the entry itself.

**Walks** hold states in nearly all registers that there are. So their loops are
`tl.range(..., disable_licm=True)`: what does not change from round to round, addresses mostly, is computed anew each
time instead of kept in registers that the states would have to leave (on an H200 375 us became 306 in gsa's forward).
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

LOG2E = 1.4426950408889634
# log2 alpha below this is as good as -inf (exp2 gives 0); -inf itself would make NaN of 0 * -inf in a product.
FLOOR = tl.constexpr(-512.0)
SHIFT = tl.constexpr(104.0)
STEP = tl.constexpr(-13.0)  # -2 SHIFT / 16


# triton.cdiv and triton.next_power_of_2 serve kernels too and cost microseconds in Python: a launch calls many.
def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The next one."""
    return 1 << (n - 1).bit_length()


@functools.cache
def pad(size: int) -> int:
    """Block width for `size` columns: a power of two, at least the 16 of a matrix instruction."""
    return max(16, power_of_two(size))


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
def own_chunk(bounds, T, NC, C, H, PACKED: tl.constexpr):
    """Chunk and head of program (chunk * H + head, ...), and of the chunk its first token, one past its last (int64, of
    the flattened [B * T] tokens) and its sequence."""
    pid = tl.program_id(0)
    c = pid // H
    h = pid - c * H
    if PACKED:
        start = tl.load(bounds + 3 * c)
        stop = tl.load(bounds + 3 * c + 1)
        n = tl.load(bounds + 3 * c + 2)
    else:
        n = (c // NC).to(tl.int64)
        start = n * T + (c - c // NC * NC) * C
        stop = tl.minimum(start + C, (n + 1) * T)
    return c, h, start, stop, n


@triton.jit
def tf32_terms(x):
    """fp32 x as a sum of two terms that tf32 holds: the nearest, and what is left of it, cut off."""
    high = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def add_dot(total, a, b, CT: tl.constexpr, PREC: tl.constexpr):
    """total plus the product; of "tf32x3" the three passes, their operands split here: Triton's split, which looks for
    infinities, takes three times the instructions."""
    if PREC == "tf32x3":
        ah, al = tf32_terms(a.to(tl.float32))
        bh, bl = tf32_terms(b.to(tl.float32))
        total = tl.dot(ah, bl, tl.dot(al, bh, total, input_precision="tf32"), input_precision="tf32")
        total = tl.dot(ah, bh, total, input_precision="tf32")
    else:
        total = tl.dot(a.to(CT), b.to(CT), total, input_precision=PREC)
    return total


@triton.jit
def dot(a, b, CT: tl.constexpr, PREC: tl.constexpr):
    return add_dot(None, a, b, CT, PREC)


@triton.jit
def masked_dot(mask, b, CT: tl.constexpr, PREC: tl.constexpr):
    """mask (0/1) times b."""
    ones = tl.where(mask, 1.0, 0.0)
    if PREC == "tf32x3":
        bh, bl = tf32_terms(b.to(tl.float32))
        product = tl.dot(ones, bh, tl.dot(ones, bl, input_precision="tf32"), input_precision="tf32")
    else:
        product = tl.dot(ones.to(CT), b.to(CT), input_precision=PREC)
    return product


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
        total = masked_dot(mask, high, tl.float32, EXACT)
    return total


@triton.jit
def leading_bits(x):
    """x cut to the bits that bf16 has, in fp32."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def exact_sum(mask, x, CT: tl.constexpr):
    """mask [A, B] (0/1) times x [B, BM] in fp32, all of whose bits take part."""
    ones = mask.to(CT)
    high = leading_bits(x)
    rest = x - high
    middle = leading_bits(rest)
    total = tl.dot(ones, (rest - middle).to(CT), input_precision="ieee")
    total = tl.dot(ones, middle.to(CT), total, input_precision="ieee")
    return tl.dot(ones, high.to(CT), total, input_precision="ieee")


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
