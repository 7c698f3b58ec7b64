"""What the portable chunked paths of gsa and gla share: blocks of tokens, decays inside a block, states between blocks.

A sequence is cut into blocks of C tokens. Inside a block every decay from token i to token t is a running product of
alpha = exp(log_alpha) in [0, 1]; nothing is ever divided and no exponent is ever positive, so a gate of exactly -inf
(alpha = 0) is exact in value and in gradient, and no gate can overflow. Between blocks only the state is carried.

Blocks are ordered by step, then by sequence, longest sequence first: the blocks of one step are a contiguous slice, so
one carried state per sequence advances with one operation per step, whatever the lengths of packed documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """Where each token of [B, T, ...] lies among the blocks.

    `active[j]` sequences have a j-th block. For packed documents `order` lists the documents longest first,
    `source` [blocks * C] names the token in each place (T where there is none) and `place` [T] is its inverse.
    """

    size: int
    batch: int
    tokens: int
    active: tuple[int, ...]
    order: Tensor | None = None
    source: Tensor | None = None
    place: Tensor | None = None

    @classmethod
    def cut(cls, x: Tensor, cu_seqlens: Tensor | None, size: int) -> Blocks:
        """Blocks of `size` tokens for x [B, T, ...], B sequences or the documents that cu_seqlens [N + 1] bounds."""
        batch, tokens = x.shape[:2]
        if cu_seqlens is None:
            return cls(size, batch, tokens, (batch,) * -(-tokens // size))
        bounds = cu_seqlens.to("cpu", torch.int64)
        starts, lengths = bounds[:-1], bounds.diff()
        order = torch.argsort(lengths, descending=True, stable=True)
        starts, lengths = starts[order], lengths[order]
        blocks = -(-lengths // size)
        steps = torch.arange(int(blocks.max()))
        active = torch.searchsorted(-blocks, -steps)  # blocks descend: how many documents have more than `step`
        step = torch.repeat_interleave(steps, active)
        document = torch.cat([torch.arange(n) for n in active.tolist()])
        offset = step[:, None] * size + torch.arange(size)
        source = torch.where(offset < lengths[document, None], starts[document, None] + offset, tokens).flatten()
        place = torch.empty(tokens + 1, dtype=torch.int64)
        place[source] = torch.arange(source.numel())
        device = x.device
        return cls(
            size, batch, tokens, tuple(active.tolist()), order.to(device), source.to(device), place[:-1].to(device)
        )

    def spans(self, limit: int) -> Iterator[Span]:
        """The blocks in order, in runs of whole steps with at most `limit` blocks (or one step)."""
        first = start = 0
        for step in range(len(self.active)):
            count = sum(self.active[first : step + 1])
            if step + 1 == len(self.active) or count + self.active[step + 1] > limit:
                yield Span(self, first, step + 1, start, start + count)
                first, start = step + 1, start + count

    def sort(self, state: Tensor) -> Tensor:
        """States [N, ...] in the order of the blocks."""
        return state if self.order is None else state[self.order]

    def unsort(self, state: Tensor) -> Tensor:
        """The inverse of `sort`."""
        return state if self.order is None else state[torch.argsort(self.order)]


@dataclass(frozen=True)
class Span:
    """The blocks of the steps first ... last - 1, which are number start ... stop - 1."""

    of: Blocks
    first: int
    last: int
    start: int
    stop: int

    @property
    def active(self) -> tuple[int, ...]:
        """How many sequences are active in each step."""
        return self.of.active[self.first : self.last]

    def gather(self, x: Tensor) -> Tensor:
        """[B, T, H, *F] -> [X, C, *F] with X = blocks * H, zeros where a block is longer than its sequence."""
        size = self.of.size
        if self.of.source is None:
            x = x[:, self.first * size : self.last * size]
            missing = (self.last - self.first) * size - x.shape[1]
            if missing:
                x = torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], dim=1)
            return x.unflatten(1, (-1, size)).transpose(0, 1).transpose(2, 3).flatten(0, 2).contiguous()
        source = self.of.source[self.start * size : self.stop * size]
        x = x[0].index_select(0, source.clamp(max=self.of.tokens - 1))
        x[source == self.of.tokens] = 0
        return x.unflatten(0, (-1, size)).transpose(1, 2).flatten(0, 1).contiguous()

    def scatter(self, x: Tensor, out: Tensor) -> None:
        """The inverse of `gather` into `out` [B, T, H, *F]."""
        size, heads = self.of.size, out.shape[2]
        if self.of.source is None:
            out = out[:, self.first * size : self.last * size]
            x = x.unflatten(0, (self.last - self.first, -1, heads)).permute(1, 0, 3, 2, *range(4, x.dim() + 2))
            out.copy_(x.flatten(1, 2)[:, : out.shape[1]])
        else:
            source = self.of.source[self.start * size : self.stop * size]
            there = source < self.of.tokens
            out[0, source[there]] = x.unflatten(0, (-1, heads)).transpose(1, 2).flatten(0, 1)[there]


def decays(alpha: Tensor, write: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What the state before a block, and each token of it, weigh at each token of the block.

    alpha, write [X, C, R] -> since_start [X, C, R], since_token [X, C, C, R]:
    since_start[t] = alpha_0 ... alpha_t;  since_token[t, i] = write_i alpha_{i+1} ... alpha_t for i <= t, else 0.
    since_token is written into `out` where that is given, which must be zero for i > t.
    """
    x, size, width = alpha.shape
    since_start = torch.empty_like(alpha)
    since_token = alpha.new_zeros(x, size, size, width) if out is None else out
    torch.cumprod(alpha, 1, out=since_start)
    since_token.diagonal(dim1=1, dim2=2).copy_(write.mT)
    for t in range(1, size):
        torch.mul(since_token[:, t - 1, :t], alpha[:, t, None], out=since_token[:, t, :t])
    return since_start, since_token


def decays_backward(
    alpha: Tensor, since_start: Tensor, since_token: Tensor, d_start: Tensor, d_token: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of `decays` for alpha and write; d_start and d_token are overwritten.

    What d_token holds for i > t is ignored.
    """
    for t in range(alpha.shape[1] - 1, 0, -1):
        d_start[:, t - 1].addcmul_(d_start[:, t], alpha[:, t])
        d_token[:, t - 1, :t].addcmul_(d_token[:, t, :t], alpha[:, t, None])
    d_write = d_token.diagonal(dim1=1, dim2=2).mT.contiguous()
    d_alpha = torch.empty_like(alpha)
    d_alpha[:, 0] = d_start[:, 0]
    torch.sum(d_token[:, 1:].mul_(since_token[:, :-1]), 2, out=d_alpha[:, 1:])  # since_token is 0 where d_token is not
    d_alpha[:, 1:].addcmul_(d_start[:, 1:], since_start[:, :-1])
    return d_alpha, d_write


def carry(state: Tensor, decay: Tensor, update: Tensor, active: tuple[int, ...]) -> Tensor:
    """state <- decay * state + update, block after block; `state` [N, H, R, X] is overwritten with the last ones.

    decay [blocks, H, R, 1], update [blocks, H, R, X] -> the state before each block [blocks, H, R, X].
    """
    entry = torch.empty_like(update)
    start, n = 0, active[0]
    entry[:n] = state[:n]
    for following in (*active[1:], 0):
        go_on, end, here = slice(start, start + following), slice(start + following, start + n), start + n
        torch.addcmul(update[go_on], decay[go_on], entry[go_on], out=entry[here : here + following])
        if following < n:
            torch.addcmul(update[end], decay[end], entry[end], out=state[following:n])
        start, n = here, following
    return entry


def carry_backward(d_state: Tensor, decay: Tensor, d_entry: Tensor, active: tuple[int, ...]) -> Tensor:
    """The gradient of `carry` for update; `d_state`, of the last states, is overwritten with that of the first ones.

    The gradient for decay is (d_update * entry).sum(-1).
    """
    d_update = torch.empty_like(d_entry)
    start, n = d_entry.shape[0], 0
    for here in reversed(active):
        # sequences that go on take it from their next block, which comes n rows after the first of this step's
        later, start = start, start - here
        if n:
            torch.addcmul(
                d_entry[later : later + n],
                decay[later : later + n],
                d_update[later : later + n],
                out=d_update[start : start + n],
            )
        d_update[start + n : later] = d_state[n:here]
        n = here
    torch.addcmul(d_entry[:n], decay[:n], d_update[:n], out=d_state[:n])
    return d_update
