"""What the kernels of gated linear attention share: the two sides of a problem, decays inside a tile, block sizes.

**Two sides.** With an upstream gradient do, everything is a derivative of one number,

    L = scale * sum_{i <= t} (r_t . D(i, t) w_i y_i) (p_t . x_i),     D(i, t) = alpha_{i+1} ... alpha_t, row by row,

where r, y live on the gated side (width R, the rows of the state) and p, x on the plain side (width X, its columns):

    gate on the key side:    r = q,  y = k,  p = do, x = v      o = dL/dp   dq = dL/dr   dk = dL/dy   dv = dL/dx
    gate on the value side:  r = do, y = v,  p = q,  x = k      o = dL/dr   dq = dL/dp   dk = dL/dx   dv = dL/dy

So one kernel per derivative serves both sides, forwards and backwards. A scalar gate, and none, are gates on the key
side whose rows are all alike.

A chunk is walked in tiles of SUB tokens with the state [R, X] in registers; `decays.py` says how decays are formed.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ...triton_chunks import FLOOR, Chunks, Numerics, add_dot, choose_numerics, load_rows, pad

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
    factored: bool  # how decays between tokens of a tile are formed, see `decays.py`
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
            "EXACT": self.numerics.exact, "FACTORED": self.factored,
        }  # fmt: skip


def plan_for(gate: str | None, HQ: int, H: int, D: int, V: int, dtype: torch.dtype) -> Plan:
    """The one configuration for these sizes.

    In bf16 tiles have 16 tokens, the depth of a matrix instruction and what factored decays allow. The products of the
    other types take three passes of fp32: fewer rows.
    """
    numerics, factored = choose_numerics(dtype), dtype == torch.bfloat16
    R, X = (V, D) if gate == "value" else (D, V)
    wide = max(pad(R), pad(X)) > 128
    group = min(triton.next_power_of_2(HQ // H), 8 if factored else 2 if wide else 4)
    tile = 16 if factored else max(16, 32 // group)
    kind = {None: NONE, "scalar": SCALAR}.get(gate, ROWS).value
    return Plan(kind, R, X, H, HQ // H, group, tile, factored, numerics)


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
def load_decay(decay, token, valid, h, H, r, R: tl.constexpr, KIND: tl.constexpr):
    """`decay` of `Decays` for tokens and rows r of the state, [len(token), len(r)] or, where rows are alike, [., 1]."""
    if KIND == ROWS:
        x = load_rows(decay, token * H + h, valid, R, r, tl.float32)
    elif KIND == SCALAR:
        x = tl.load(decay + token * H + h, mask=valid, other=0.0).to(tl.float32)[:, None]
    else:
        x = tl.full([token.shape[0], 1], 1.0, tl.float32)
    return x


@triton.jit
def load_total(before, last, h, H, r, R: tl.constexpr, KIND: tl.constexpr):
    """The decay [len(r)] of a whole tile whose last token is `last`."""
    if KIND == ROWS:
        x = tl.load(before + (last * H + h) * R + r, mask=r < R, other=1.0).to(tl.float32)
    else:
        x = tl.full([r.shape[0]], 1.0, tl.float32)
        if KIND == SCALAR:
            x *= tl.load(before + last * H + h).to(tl.float32)
    return x


@triton.jit
def advance(
    state, y, x, write, before, after, first, stop, h, H, r, e,
    R: tl.constexpr, X: tl.constexpr, SUB: tl.constexpr, SWAPPED: tl.constexpr,
    KIND: tl.constexpr, WEIGHTED: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """The state [rows r, columns e] (or [columns e, rows r]) after a tile, from that before it."""
    token = first + tl.arange(0, SUB)
    valid = token < stop
    yb = load_written(y, write, first, stop, h, H, r, R, SUB, KIND, WEIGHTED)
    xb = load_rows(x, token * H + h, valid, X, e, CT)
    total = load_total(before, tl.minimum(first + SUB, stop) - 1, h, H, r, R, KIND)
    written = (yb * load_decay(after, token, valid, h, H, r, R, KIND)).to(CT)
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
