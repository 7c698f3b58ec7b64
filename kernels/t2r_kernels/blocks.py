"""What the portable chunked paths of gsa and gla share: blocks of tokens, decays inside a block, states between blocks.

A sequence is cut into blocks of C tokens. Inside a block every decay from token i to token t is a running product of
alpha = exp(log_alpha) in [0, 1]; nothing is ever divided and no exponent is ever positive, so a gate of exactly -inf
(alpha = 0) is exact in value and in gradient, and no gate can overflow. Between blocks only the state is carried.

Blocks are ordered by step, then by sequence, longest sequence first: the blocks of one step are a contiguous slice, so
one carried state per sequence advances with one operation per step, whatever the lengths of packed documents.
"""

from __future__ import annotations

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

    def gather(self, x: Tensor) -> Tensor:
        """[B, T, H, *F] -> [blocks, H, C, *F], zeros where a block is longer than its sequence."""
        if self.source is None:
            steps = len(self.active)
            missing = steps * self.size - self.tokens
            if missing:
                x = torch.cat([x, x.new_zeros(self.batch, missing, *x.shape[2:])], dim=1)
            x = x.unflatten(1, (steps, self.size)).transpose(0, 1).flatten(0, 1)
        else:
            x = torch.cat([x[0], x.new_zeros(1, *x.shape[2:])])[self.source].unflatten(0, (-1, self.size))
        return x.transpose(1, 2)

    def scatter(self, x: Tensor) -> Tensor:
        """[blocks, H, C, *F] -> [B, T, H, *F], the inverse of `gather`."""
        x = x.transpose(1, 2)
        if self.place is not None:
            return x.flatten(0, 1)[self.place].unsqueeze(0)
        return x.unflatten(0, (len(self.active), self.batch)).transpose(0, 1).flatten(1, 2)[:, : self.tokens]

    def sort(self, state: Tensor) -> Tensor:
        """States [N, ...] in the order of the blocks."""
        return state if self.order is None else state[self.order]

    def unsort(self, state: Tensor) -> Tensor:
        """The inverse of `sort`."""
        return state if self.order is None else state[torch.argsort(self.order)]


class _Decays(torch.autograd.Function):
    @staticmethod
    def forward(ctx, alpha: Tensor, write: Tensor) -> Tensor:  # type: ignore[override]
        size = alpha.shape[1]
        out = alpha.new_zeros(alpha.shape[0], size, size + 1, alpha.shape[2])
        out[:, 0, 0] = alpha[:, 0]
        out[:, 0, 1] = write[:, 0]
        for t in range(1, size):
            torch.mul(out[:, t - 1, : t + 1], alpha[:, t, None], out=out[:, t, : t + 1])
            out[:, t, t + 1] = write[:, t]
        ctx.save_for_backward(alpha, out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        alpha, out = ctx.saved_tensors
        d_alpha, d_write = torch.empty_like(alpha), torch.empty_like(alpha)
        size = alpha.shape[1]
        total = grad[:, size - 1]
        for t in range(size - 1, 0, -1):
            d_write[:, t] = total[:, t + 1]
            total = total[:, : t + 1]
            torch.sum(total * out[:, t - 1, : t + 1], 1, out=d_alpha[:, t])
            total = torch.addcmul(grad[:, t - 1, : t + 1], total, alpha[:, t, None])
        d_write[:, 0] = total[:, 1]
        d_alpha[:, 0] = total[:, 0]
        return d_alpha, d_write


def decays(alpha: Tensor, write: Tensor) -> tuple[Tensor, Tensor]:
    """What each token of a block, and the state before it, weigh at each later token.

    alpha, write [X, C, R] -> since_start [X, C, R], since_token [X, C, C, R]:
    since_start[t] = alpha_0 ... alpha_t;  since_token[t, i] = write_i alpha_{i+1} ... alpha_t for i <= t, else 0.
    """
    both = _Decays.apply(alpha, write)
    return both[:, :, 0], both[:, :, 1:]


class _Carry(torch.autograd.Function):
    @staticmethod
    def forward(ctx, initial: Tensor, decay: Tensor, update: Tensor, active: tuple[int, ...]):  # type: ignore[override]
        state, entry = initial.clone(), torch.empty_like(update)
        start = 0
        for n in active:
            here = slice(start, start + n)
            entry[here] = state[:n]
            torch.addcmul(update[here], decay[here], state[:n], out=state[:n])
            start += n
        ctx.save_for_backward(decay, entry)
        ctx.active = active
        return entry, state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_entry: Tensor, d_final: Tensor):  # type: ignore[override]
        decay, entry = ctx.saved_tensors
        d_state, d_update = d_final.clone(), torch.empty_like(entry)
        start = entry.shape[0]
        for n in reversed(ctx.active):
            start -= n
            here = slice(start, start + n)
            d_update[here] = d_state[:n]
            torch.addcmul(d_entry[here], decay[here], d_state[:n], out=d_state[:n])
        d_decay = (d_update * entry).sum(-1, keepdim=True)
        return d_state, d_decay, d_update, None


def carry(initial: Tensor, decay: Tensor, update: Tensor, active: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """state <- decay * state + update, block after block.

    initial [N, H, R, X], decay [blocks, H, R, 1], update [blocks, H, R, X] -> the state before each block
    [blocks, H, R, X] and after the last one of each sequence [N, H, R, X].
    """
    return _Carry.apply(initial, decay, update, active)
