"""More slots than a program holds: the slots of a head in equal pieces, which meet only in the softmax.

A slot's state, scores and part of the output depend on no other slot but through the softmax. So each piece is a head
of its own, with the keys, values and queries of its neighbours, and a softmax over its own slots; beside its output
o_j it leaves l_j, log2 of the sum of its 2^score. Then

    o = sum_j 2^(l_j - l) o_j,      l = log2 sum_j 2^l_j,

and in the backward pass, with p = 2^(score - l) over all slots, every piece needs of the others only l and
delta = do . o, which is the same sum of the pieces' do . o_j.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad as pad_with_zeros

from ...triton_chunks import ceil_div, power_of_two
from ...triton_launch import launch

LOWEST = tl.constexpr(-1e30)  # in the place of the maximum of no scores: -inf - -inf would be NaN


@dataclass(frozen=True)
class Pieces:
    """`count` pieces of `each` slots, of which the last may be too long for the `slots` there are: what it has beyond
    them is never written (alpha = 1) and never visible."""

    slots: int
    count: int
    each: int

    def cut(self, x: Tensor, dim: int) -> Tensor:
        """[..., H, M, ...] -> [..., H * count, each, ...], M at `dim` (negative); zeros where there are no slots."""
        spare = self.count * self.each - self.slots
        if spare:
            x = pad_with_zeros(x, [0, 0] * (-dim - 1) + [0, spare])
        return x.unflatten(dim, (self.count, self.each)).flatten(dim - 2, dim - 1)

    def join(self, x: Tensor, dim: int) -> Tensor:
        """[..., H * count, each, ...] -> [..., H, M, ...]."""
        return x.unflatten(dim - 1, (-1, self.count)).flatten(dim - 1, dim).narrow(dim, 0, self.slots).contiguous()

    def empty(self, x: Tensor) -> Tensor:
        """Room for what `join` makes into x."""
        return torch.empty(x.shape[0], x.shape[1] * self.count, self.each, x.shape[3], dtype=x.dtype, device=x.device)

    def visible(self, visible: Tensor | None, k: Tensor) -> Tensor | None:
        """What hides the slots that there are not."""
        if visible is None and self.count * self.each > self.slots:
            return torch.full(k.shape[:2], self.slots, dtype=torch.int32, device=k.device)
        return visible


@functools.cache
def choose(slots: int, most: int) -> Pieces:
    """As few pieces of at most `most` slots as possible; several have a multiple of 8, to keep rows aligned."""
    count = ceil_div(slots, most)
    return Pieces(slots, count, slots if count == 1 else ceil_div(ceil_div(slots, count), 8) * 8)


def forward(pieces: Pieces, run: Callable, q, k, v, log_alpha, visible, scale, initial, final, cu_seqlens):
    """As `ops.run_forward`, by run (`forward.forward` or `walk_forward`)."""
    if pieces.count == 1:
        return run(q, k, v, log_alpha, visible, scale, initial, final, cu_seqlens)
    starts = initial and [pieces.cut(state, -2) for state in initial]
    ends = final and [pieces.empty(state) for state in final]
    o = run(q, k, v, pieces.cut(log_alpha, -1), pieces.visible(visible, k), scale, starts, ends, cu_seqlens)
    for state, end in zip(final or (), ends or (), strict=True):
        state.copy_(pieces.join(end, -2))
    return o


def backward(pieces: Pieces, run: Callable, q, k, v, log_alpha, visible, do, dfinal, scale, initial, cu_seqlens):
    """As `ops.run_backward`, by run (`backward.backward` or `walk_backward`)."""
    if pieces.count == 1:
        return run(q, k, v, log_alpha, visible, do, dfinal, scale, initial, cu_seqlens)
    starts, dends = (x and [pieces.cut(state, -2) for state in x] for x in (initial, dfinal))
    dq, dk, dv, dlog_alpha, dstarts = run(
        q, k, v, pieces.cut(log_alpha, -1), pieces.visible(visible, k), do, dends, scale, starts, cu_seqlens
    )
    return dq, dk, dv, pieces.join(dlog_alpha, -1), dstarts and [pieces.join(state, -2) for state in dstarts]


@triton.jit
def combine_kernel(
    parts, part_lse, out, lse, rows, G, P,
    V: tl.constexpr, BV: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """out = sum_j 2^(l_j - l) parts_j and l of R rows (token, query head) from their P pieces; without l_j the sum."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    valid = row < rows
    first = row // G * (G * P) + row % G
    e = tl.arange(0, BV)
    mask = valid[:, None] & (e < V)[None, :]
    top = tl.full([R], LOWEST, tl.float32)
    if part_lse is not None:
        for j in range(P):
            top = tl.maximum(top, tl.load(part_lse + first + j * G, mask=valid, other=0.0))
    total = tl.zeros([R], tl.float32)
    acc = tl.zeros([R, BV], tl.float32)
    for j in range(P):
        part = tl.load(parts + (first + j * G)[:, None] * V + e[None, :], mask=mask, other=0.0).to(tl.float32)
        if part_lse is not None:
            weight = tl.exp2(tl.load(part_lse + first + j * G, mask=valid, other=0.0) - top)
            part *= weight[:, None]
            total += weight
        acc += part
    if part_lse is not None:
        acc /= total[:, None]
        tl.store(lse + row, top + tl.log2(total), mask=valid)
    tl.store(out + row[:, None] * V + e[None, :], acc, mask=mask)


def _combine(parts: Tensor, part_lse: Tensor | None, lse: Tensor | None, group: int, count: int) -> Tensor:
    B, T, heads, V = parts.shape
    rows = B * T * heads // count
    out = torch.empty(B, T, heads // count, V, dtype=parts.dtype, device=parts.device)
    block = 16 if V > 1 else 128
    launch(
        combine_kernel, (ceil_div(rows, block), 1, 1),
        parts, part_lse, out, lse, rows, group, count, V, power_of_two(V), block, num_warps=4,
    )  # fmt: skip
    return out


def combine(parts: Tensor, part_lse: Tensor, group: int, count: int) -> tuple[Tensor, Tensor]:
    """parts [B, T, H * count * group, V] and their l_j -> (their weighted sum [B, T, H * group, V], l)."""
    B, T, heads, _ = parts.shape
    lse = torch.empty(B, T, heads // count, dtype=torch.float32, device=parts.device)
    return _combine(parts, part_lse, lse, group, count), lse


def add(parts: Tensor, group: int, count: int) -> Tensor:
    """[B, T, H * count * group, V] -> [B, T, H * group, V], the sum over pieces."""
    return _combine(parts, None, None, group, count)
