"""Softmax attention over the first and the last tokens of a sequence, in time and memory linear in its length."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from t2r.model.mixers.base import States
from t2r.model.sequence import SequenceInfo
from t2r_kernels.gsa.gates import written_slot


@dataclass(frozen=True)
class Window:
    """Attention over the first `sinks` and the last `size` tokens. What it remembers are `sinks + size` keys and
    values, each in the slot that the clock names."""

    sinks: int
    size: int

    @property
    def block(self) -> int:
        """Tokens per block of a long sequence: a query's window lies in its own block and the one before."""
        return -(-self.size // 16) * 16

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        info: SequenceInfo,
        states: States | None,
        keep: bool,
        scale: float,
    ) -> tuple[Tensor, States | None]:
        """o [B, T, HQ, D] from q [B, T, HQ, D], k and v [B, T, H, D] and the slots [B, H, S + R, D] of the tokens
        before; with `keep`, the slots after these tokens."""
        run = self.attend_whole if q.shape[1] <= self.block else self.attend_blocks
        o = run(q, k, v, info, states, scale)
        return o, self._write(states, k.transpose(1, 2), v.transpose(1, 2), info) if keep else None

    def attend_whole(
        self, q: Tensor, k: Tensor, v: Tensor, info: SequenceInfo, states: States | None, scale: float
    ) -> Tensor:
        """The definition: every query beside every key, and a mask."""
        query_heads, heads = q.shape[2], k.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        own = torch.eye(q.shape[2], dtype=torch.bool, device=q.device)  # padding sees itself: no empty softmax
        seen, keys, values = self._visible(info, info) | own, k, v
        if states is not None:
            keys, values = torch.cat([states[0], k], 2), torch.cat([states[1], v], 2)
            seen = torch.cat([self._visible(info, self._slots(info.position[:, 0])), seen], 2)
        o = F.scaled_dot_product_attention(
            q, keys, values, attn_mask=seen[:, None], scale=scale, enable_gqa=query_heads != heads
        )
        return o.transpose(1, 2)

    def attend_blocks(
        self, q: Tensor, k: Tensor, v: Tensor, info: SequenceInfo, states: States | None, scale: float
    ) -> Tensor:
        """The same, block by block: a block of C queries sees itself, the block before (of the first one: the slots)
        and the sinks of the one document that may have begun earlier.

        Tokens are told apart by their column and the column at which their document starts, which is negative where
        tokens came before.
        """
        shape, mask, position, order = q.shape, info.mask, info.position, None
        if info.cu_seqlens is not None:
            q, k, v = (x.flatten(0, 1)[None] for x in (q, k, v))
            position = position.flatten()[None]
        if mask is not None:  # real tokens first, so that the columns of a window are neighbours
            order = (~mask).int().argsort(dim=1, stable=True)
            q, k, v = (_pick(x, order) for x in (q, k, v))
            position, mask = position.gather(1, order), mask.gather(1, order)
        rows, length, heads, dim = k.shape
        size, blocks = self.block, -(-length // self.block)
        missing = size * blocks - length
        column = torch.arange(size * blocks, device=q.device)
        start = F.pad(column[:length] - position, (0, missing))
        real = F.pad(start.new_ones(rows, length, dtype=torch.bool) if mask is None else mask, (0, missing))
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, missing)) for x in (q, k, v))

        # [rows, blocks, C]; the keys of a block begin one block earlier
        columns = column.view(1, blocks, size)
        starts, first = start.view(rows, blocks, size), start[:, ::size, None]
        sink = first + torch.arange(-(-self.sinks // 8) * 8, device=q.device)  # a multiple of 8: an aligned mask
        key_start = _pairs(torch.cat([start[:, :1].expand(-1, size), start], 1), size)
        front, front_real = self._before(k, states, start[:, 0])
        key_real = _pairs(torch.cat([front_real, real], 1), size)
        key_column = columns[..., :1] + torch.arange(-size, size, device=q.device)
        age = columns[..., None] - key_column[..., None, :]
        near = (age < self.size) | (key_column - key_start < self.sinks)[..., None, :]
        near = near & (age >= 0) & (starts[..., None] == key_start[..., None, :]) & key_real[..., None, :]
        far = (starts[..., None] == first[..., None]) & (sink < key_column[..., :1])[..., None, :]
        far = far & (sink - first < self.sinks)[..., None, :]
        seen = torch.cat([far, near | (age == 0)], -1)  # padding sees itself

        keys, values = (
            torch.cat([self._sinks(x, slots, sink), _pairs(torch.cat([before, x], 1), size)], 2)
            for x, slots, before in zip((k, v), states or (None, None), front, strict=True)
        )
        group = q.shape[2] // heads
        q = q.view(rows, blocks, size, heads, group, dim).permute(0, 1, 3, 4, 2, 5)
        seen = seen[:, :, None].expand(-1, -1, group, -1, -1)
        o = F.scaled_dot_product_attention(
            q.reshape(rows * blocks, heads, group * size, dim),
            keys.transpose(2, 3).flatten(0, 1),
            values.transpose(2, 3).flatten(0, 1),
            attn_mask=seen.reshape(rows * blocks, 1, group * size, seen.shape[-1]),
            scale=scale,
        )
        o = o.view(rows, blocks, heads, group, size, dim).permute(0, 1, 4, 2, 3, 5)
        o = o.reshape(rows, blocks * size, heads * group, dim)[:, :length]
        return (o if order is None else _pick(o, order.argsort(1))).reshape(shape)

    def _before(self, k: Tensor, states: States | None, start: Tensor) -> tuple[States, Tensor]:
        """Keys and values [rows, C, H, D] of the C columns before the first one, and which of them there are."""
        rows, _, heads, dim = k.shape
        if states is None:
            nothing = k.new_zeros(rows, self.block, heads, dim)
            return (nothing, nothing), torch.zeros(rows, self.block, dtype=torch.bool, device=k.device)
        column = torch.arange(-self.block, 0, device=k.device)
        position = column - start[:, None]
        kept = (position >= 0) & ((column >= -self.size) | (position < self.sinks))
        slot = written_slot(position, self.sinks, self.size).clamp(min=0)
        return tuple(_pick(x.transpose(1, 2), slot) for x in states), kept

    def _sinks(self, x: Tensor, slots: Tensor | None, sink: Tensor) -> Tensor:
        """[rows, blocks, S, H, D] from the columns `sink` [rows, blocks, S] of x [rows, T, H, D]; from the slots where
        a column lies before the first one."""
        found = _pick(x, sink.flatten(1).clamp(0, x.shape[1] - 1)).unflatten(1, sink.shape[1:])
        if slots is None:
            return found
        earlier = slots.transpose(1, 2)[:, None, : sink.shape[2]]
        earlier = F.pad(earlier, (0, 0, 0, 0, 0, sink.shape[2] - earlier.shape[2]))
        return torch.where(sink[..., None, None] < 0, earlier, found)

    def _visible(self, query: SequenceInfo, key: SequenceInfo) -> Tensor:
        """[B, T, J] bool: what each query sees of J keys."""
        age = query.position[:, :, None] - key.position[:, None]
        seen = (age >= 0) & ((age < self.size) | (key.position[:, None] < self.sinks))
        if key.mask is not None:
            seen = seen & key.mask[:, None]
        documents = query.documents()
        return seen if documents is None else seen & (documents[:, :, None] == documents[:, None])

    def _slots(self, seen: Tensor) -> SequenceInfo:
        """Which token each slot holds after `seen` [B] tokens; the mask is False where none is."""
        slot = torch.arange(self.sinks + self.size, device=seen.device)
        last = seen[:, None] - 1
        token = torch.where(slot < self.sinks, slot, last - (last - slot) % self.size)
        return SequenceInfo(token, (token < seen[:, None]) & ((slot < self.sinks) | (token >= self.sinks)))

    def _write(self, states: States | None, k: Tensor, v: Tensor, info: SequenceInfo) -> States:
        """The slots after these tokens; of the tokens that meet in a slot, only the last is written."""
        position, slots = info.position, self.sinks + self.size
        end = position[:, -1:] + (1 if info.mask is None else info.mask[:, -1:].long())
        kept = (position < self.sinks) | (position >= end - self.size)
        if info.mask is not None:
            kept = kept & info.mask
        # one slot more than there are, for the tokens that are not kept
        index = torch.where(kept, written_slot(position, self.sinks, self.size), slots)[:, None, :, None].expand_as(k)
        new = []
        for old, fresh in zip(states or (None, None), (k, v), strict=True):
            held = fresh.new_zeros(*fresh.shape[:2], slots + 1, fresh.shape[-1])
            if old is not None:
                held[:, :, :-1] = old
            new.append(held.scatter(2, index, fresh)[:, :, :-1])
        return tuple(new)


def _pairs(x: Tensor, size: int) -> Tensor:
    """[rows, blocks, 2 C, ...]: each block of x [rows, C + blocks * C, ...] but the first, behind the one before it."""
    return x.unfold(1, 2 * size, size).movedim(-1, 2)


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """x [rows, T, H, D] at `index` [rows, J] of its second dimension."""
    return x.gather(1, index[..., None, None].expand(-1, -1, *x.shape[2:]))
