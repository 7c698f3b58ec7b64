"""What the kernels of gated linear attention share: the two sides of a problem, decays inside a tile, block sizes.

**Two sides.** With an upstream gradient do, everything is a derivative of one number,

    L = scale * sum_{i <= t} (r_t . D(i, t) w_i y_i) (p_t . x_i),     D(i, t) = alpha_{i+1} ... alpha_t, row by row,

where r, y live on the gated side (width R, the rows of the state) and p, x on the plain side (width X, its columns):

    gate on the key side:    r = q,  y = k,  p = do, x = v      o = dL/dp   dq = dL/dr   dk = dL/dy   dv = dL/dx
    gate on the value side:  r = do, y = v,  p = q,  x = k      o = dL/dr   dq = dL/dp   dk = dL/dx   dv = dL/dy

So one kernel per derivative serves both sides, forwards and backwards. A scalar gate, and none, are gates on the key
side whose rows are all alike.

**Decays.** A chunk is walked in tiles of SUB tokens with the state [R, X] in registers. Inside a tile a pair (i, t) is
split by a binary tree (see `gsa/triton/common.py`): every exponent is a sum of non-positive numbers, nothing overflows
or cancels, and a gate of exactly zero forgets exactly.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ...gsa.triton.common import (
    FLOOR,
    Chunks,
    Numerics,
    choose_numerics,
    load_rows,
    prefix_decay,
    split,
    suffix_decay,
)

NONE, SCALAR, ROWS = (tl.constexpr(kind) for kind in range(3))


@dataclass(frozen=True)
class Plan:
    """One problem: which side is gated, and the block sizes. A tile's rows are (token, query head): SUB * group."""

    kind: int
    R: int
    X: int
    heads: int
    group: int
    group_block: int  # query heads per tile, a power of two
    tile: int  # tokens
    numerics: Numerics

    @property
    def rows(self) -> int:
        return self.tile * self.group_block

    @property
    def group_tiles(self) -> int:
        return triton.cdiv(self.group, self.group_block)

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.R, self.X, self.tile, self.tile.bit_length() - 1, self.group_block

    def options(self, chunks: Chunks, write: torch.Tensor | None) -> dict:
        """What every kernel needs to know besides sizes."""
        return {
            "PACKED": chunks.bounds is not None, "KIND": self.kind, "WEIGHTED": write is not None,
            "CT": self.numerics.operand, "SPLIT": self.numerics.split, "PREC": self.numerics.precision,
            "EXACT": self.numerics.exact,
        }  # fmt: skip


def pad(size: int) -> int:
    """Block width for `size` columns: a power of two, at least the 16 of a matrix instruction."""
    return max(16, triton.next_power_of_2(size))


def plan_for(gate: str | None, HQ: int, H: int, D: int, V: int, dtype: torch.dtype) -> Plan:
    """The one configuration for these sizes.

    Tiles have at least 16 tokens, the depth of a matrix instruction, and 64 rows, the height of one on Hopper; 128 for
    groups beyond four heads and for wide states, which then spread over eight warps. In fp32, whose products take three
    passes, tiles are smaller.
    """
    numerics = choose_numerics(dtype)
    R, X = (V, D) if gate == "value" else (D, V)
    half = numerics.store != torch.float32
    wide = max(pad(R), pad(X)) > 128
    if half:
        # Tiles of 64 tokens of one head came out of Triton 3.6 with wrong gradients: one head takes the place of two.
        group = min(max(2, triton.next_power_of_2(HQ // H)), 8)
        tile = 32 if wide and group == 4 else max(16, 64 // group)
    else:
        group = min(triton.next_power_of_2(HQ // H), 2 if wide else 4)
        tile = max(16, 32 // group)
    kind = {None: NONE, "scalar": SCALAR}.get(gate, ROWS).value
    return Plan(kind, R, X, H, HQ // H, group, tile, numerics)


@triton.jit
def add_dot(acc, a, b, CT: tl.constexpr, PREC: tl.constexpr):
    return tl.dot(a.to(CT), b.to(CT), acc, input_precision=PREC)


@triton.jit
def load_gate(gate, first, stop, h, H, r, R: tl.constexpr, SUB: tl.constexpr, KIND: tl.constexpr):
    """log2 alpha of a tile for rows r of the state, [SUB, len(r)]; 0 for tokens past the end."""
    token = first + tl.arange(0, SUB)
    if KIND == ROWS:
        inside = (token < stop)[:, None] & (r < R)[None, :]
        x = tl.load(gate + (token * H + h)[:, None] * R + r[None, :], mask=inside, other=0.0).to(tl.float32)
    else:
        x = tl.zeros([SUB, r.shape[0]], tl.float32)
        if KIND == SCALAR:
            x += tl.load(gate + token * H + h, mask=token < stop, other=0.0).to(tl.float32)[:, None]
    return tl.maximum(x * 1.4426950408889634, FLOOR)


@triton.jit
def load_weight(write, first, stop, h, H, r, R: tl.constexpr, SUB: tl.constexpr, KIND: tl.constexpr):
    """The write weights of a tile as they multiply rows r of what is written, [SUB, len(r)] or [SUB, 1]."""
    token = first + tl.arange(0, SUB)
    if KIND == ROWS:
        inside = (token < stop)[:, None] & (r < R)[None, :]
        w = tl.load(write + (token * H + h)[:, None] * R + r[None, :], mask=inside, other=0.0).to(tl.float32)
    else:
        w = tl.load(write + token * H + h, mask=token < stop, other=0.0).to(tl.float32)[:, None]
    return w


@triton.jit
def load_written(
    y, write, first, stop, h, H, r, R: tl.constexpr, SUB: tl.constexpr, KIND: tl.constexpr, WEIGHTED: tl.constexpr
):
    """w y of a tile's tokens for rows r of the state, [SUB, len(r)] in fp32."""
    token = first + tl.arange(0, SUB)
    yb = load_rows(y, token * H + h, token < stop, R, r, tl.float32)
    if WEIGHTED:
        yb *= load_weight(write, first, stop, h, H, r, R, SUB, KIND)
    return yb


@triton.jit
def to_rows(x, BG: tl.constexpr):
    """x [SUB, N] of tokens for the rows (token, query head) of a tile, [SUB * BG, N]."""
    if BG > 1:
        x = tl.reshape(tl.broadcast_to(x[:, None, :], [x.shape[0], BG, x.shape[1]]), [x.shape[0] * BG, x.shape[1]])
    return x


@triton.jit
def tile_decays(x, LOG_SUB: tl.constexpr, KIND: tl.constexpr, SPLIT: tl.constexpr, EXACT: tl.constexpr):
    """For log2 alpha x [SUB, BR]: the decay from the tile's start through each token, from after it to the tile's end,
    and of the whole tile [BR]."""
    if KIND == NONE:
        before = tl.full(x.shape, 1.0, tl.float32)
        after = before
        total = tl.full([x.shape[1]], 1.0, tl.float32)
    else:
        i = tl.arange(0, x.shape[0])
        high, low = split(x, SPLIT)
        before = prefix_decay(i, i, high, low, LOG_SUB, SPLIT, EXACT)
        after = suffix_decay(i, high, low, LOG_SUB, SPLIT, EXACT)
        total = tl.exp2(tl.sum(x, 0))
    return before, after, total


@triton.jit
def pair_decay(x, BG: tl.constexpr, KIND: tl.constexpr, SPLIT: tl.constexpr, EXACT: tl.constexpr):
    """D(i, t) of a gate whose rows are alike (x [SUB, BR] has equal columns), [rows, SUB]; 0 where i > t."""
    t = tl.arange(0, x.shape[0])
    i = tl.arange(0, x.shape[0])
    if KIND == NONE:
        decay = tl.where(i[None, :] <= t[:, None], 1.0, 0.0)
    else:
        # The exponent is the sum of x_j over i < j <= t, as a product of [x_j if j <= t] and [1 if j > i].
        until = tl.where(t[:, None] <= i[None, :], tl.max(x, 1)[:, None], 0.0)
        high, low = split(tl.trans(until), SPLIT)
        after = tl.where(t[:, None] > i[None, :], 1.0, 0.0)
        if SPLIT:
            exponent = tl.dot(low, after.to(tl.bfloat16), tl.dot(high, after.to(tl.bfloat16)))
        else:
            exponent = tl.dot(high, after, input_precision=EXACT)
        decay = tl.where(i[None, :] <= t[:, None], tl.exp2(exponent), 0.0)
    return to_rows(decay, BG)


@triton.jit
def advance(
    state, y, x, write, gate, first, stop, h, H, r, e,
    R: tl.constexpr, X: tl.constexpr, SUB: tl.constexpr, LOG_SUB: tl.constexpr, SWAPPED: tl.constexpr,
    KIND: tl.constexpr, WEIGHTED: tl.constexpr, CT: tl.constexpr, SPLIT: tl.constexpr, PREC: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """The state [rows r, columns e] (or [columns e, rows r]) after a tile, from that before it."""
    token = first + tl.arange(0, SUB)
    yb = load_written(y, write, first, stop, h, H, r, R, SUB, KIND, WEIGHTED)
    xb = load_rows(x, token * H + h, token < stop, X, e, CT)
    _, after, total = tile_decays(load_gate(gate, first, stop, h, H, r, R, SUB, KIND), LOG_SUB, KIND, SPLIT, EXACT)
    written = (yb * after).to(CT)
    if SWAPPED:
        state = add_dot(state * total[None, :], tl.trans(xb), written, CT, PREC)
    else:
        state = add_dot(state * total[:, None], tl.trans(written), xb, CT, PREC)
    return state


@triton.jit
def load_state(states, c, h, H, r, e, R: tl.constexpr, X: tl.constexpr, SWAPPED: tl.constexpr):
    """Rows r and columns e of the state of chunk c and head h in fp32, or with SWAPPED columns by rows.

    The matrix instructions want 64 rows: the side of which a program holds everything.
    """
    base = states + (c.to(tl.int64) * H + h) * (R * X)
    if SWAPPED:
        state = tl.load(base + r[None, :] * X + e[:, None], mask=(r < R)[None, :] & (e < X)[:, None], other=0.0)
    else:
        state = tl.load(base + r[:, None] * X + e[None, :], mask=(r < R)[:, None] & (e < X)[None, :], other=0.0)
    return state.to(tl.float32)
