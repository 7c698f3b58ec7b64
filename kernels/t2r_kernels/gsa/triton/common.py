"""What the GSA kernels share: the block sizes of the general path, and how gates and visible slots are read."""

from dataclasses import dataclass

import triton
import triton.language as tl

from ...triton_chunks import FLOOR, ceil_div, pad, power_of_two


@dataclass(frozen=True)
class Blocks:
    """Block sizes of one problem: the query heads of a group share tiles of chunk * group rows."""

    chunk: int
    group: int  # query heads per tile, a power of two
    group_tiles: int
    slots: int  # M padded to a power of two, at least 16
    key: int  # width of a slice of D
    value: int
    warps: int
    stages: int


def choose_blocks(group: int, D: int, V: int, M: int, itemsize: int) -> Blocks:
    """The one configuration for these sizes, at most 64 slots. Rows are a multiple of 64, the height of a Hopper matrix
    instruction."""
    slots = pad(M)
    rows = 128 if itemsize == 2 else 64
    tile = min(power_of_two(group), rows // 16)
    chunk = min(64 if rows == 128 else 32, max(16, rows // tile))
    width = 64 if itemsize == 2 else 32
    return Blocks(
        chunk=chunk,
        group=tile,
        group_tiles=ceil_div(group, tile),
        slots=slots,
        key=min(width, pad(D)),
        value=min(width, pad(V)),
        warps=8 if chunk * tile * slots >= 8192 else 4,
        stages=2 if itemsize == 2 else 1,
    )


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
def readable(visible, start, t, row_valid, m, M: tl.constexpr, LIMITED: tl.constexpr, before=0):
    """Which slots each row may read, [rows, BM]: all M, or with LIMITED the first visible[token] - before of them."""
    if LIMITED:
        limit = tl.load(visible + start + t, mask=row_valid, other=M) - before
        seen = m[None, :] < tl.minimum(limit, M)[:, None]
    else:
        seen = (m < M)[None, :] & (t >= 0)[:, None]
    return seen
