"""What a mixer must know of the sequences in a batch: each token's position, padding, document boundaries."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class SequenceInfo:
    """Stands in the place of `attention_mask` in a mixer's call.

    Attributes:
        position: [B, T] int64, the clock's t: how many real tokens of its sequence came before this one. Unlike
            `position_ids` it never counts padding, and it goes on counting from the cache.
        mask: [B, T] bool, True at real tokens; None when all are.
        cu_seqlens: int32 [N + 1], the boundaries of packed documents in the flattened B * T tokens; None when each
            row is one sequence.
    """

    position: Tensor
    mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    _visible: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def visible(self, slots: int) -> Tensor:
        """[B, T] int32, how many of so many slots tokens have been written to, the token's own included. Kept, for the
        other layers: in decoding every small kernel counts."""
        if slots not in self._visible:
            self._visible[slots] = (self.position + 1).clamp(max=slots).int()
        return self._visible[slots]

    def to(self, device: Any, **kwargs: Any) -> "SequenceInfo":
        """The same on another device; accelerate calls it where a `device_map` splits the layers."""

        def moved(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device, **kwargs)

        return SequenceInfo(self.position.to(device, **kwargs), moved(self.mask), moved(self.cu_seqlens))

    @staticmethod
    def build(
        batch: int,
        length: int,
        device: torch.device,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        seen: Tensor | None = None,
    ) -> "SequenceInfo":
        """From the arguments of a transformers forward.

        Args:
            attention_mask: [B, >= T], non-zero at real tokens; columns before the last T belong to the cache.
            position_ids: [B or 1, T]. Where they do not rise by one, a packed document begins, as transformers has it;
                looked at only without `attention_mask`, `cu_seqlens` and `seen`.
            cu_seqlens: [N + 1], the packed documents' boundaries in the flattened rows; row starts are among them.
            seen: [B], the real tokens already in the cache.

        Raises:
            ValueError: a mask of the wrong shape, or packed documents together with padding or a cache.
        """
        if attention_mask is not None and (attention_mask.dim() != 2 or attention_mask.shape[1] < length):
            raise ValueError(f"attention_mask: shape {tuple(attention_mask.shape)}, must be [B, T] with T >= {length}")
        if cu_seqlens is None and position_ids is not None and attention_mask is None and seen is None:
            cu_seqlens = _find_documents(position_ids.expand(batch, length))
        if cu_seqlens is not None:
            if attention_mask is not None or seen is not None:
                raise ValueError("packed documents: attention_mask and past_key_values must be None")
            token = torch.arange(batch * length, device=device)
            bounds = cu_seqlens.to(device, torch.int64)
            start = bounds[torch.searchsorted(bounds, token, right=True) - 1]
            return SequenceInfo((token - start).view(batch, length), None, bounds.to(torch.int32))
        before = torch.zeros(batch, 1, dtype=torch.int64, device=device) if seen is None else seen.to(device)[:, None]
        if attention_mask is None:
            return SequenceInfo(before + torch.arange(length, device=device))
        mask = attention_mask[:, -length:].to(device=device, dtype=torch.bool)
        return SequenceInfo(before + mask.cumsum(1) - mask.long(), mask)

    def documents(self) -> Tensor | None:
        """[B, T] int64, the number of each token's packed document; None when each row is one sequence."""
        if self.cu_seqlens is None:
            return None
        token = torch.arange(self.position.numel(), device=self.position.device)
        return torch.searchsorted(self.cu_seqlens.long(), token, right=True).view(self.position.shape)


def _find_documents(position_ids: Tensor) -> Tensor | None:
    """The boundaries of packed documents in the flattened rows, or None when every row is one sequence."""
    if torch.compiler.is_compiling():
        raise ValueError("position_ids under torch.compile: pass cu_seq_lens_q too, or leave position_ids out")
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids.diff(dim=1) != 1
    if not begins[:, 1:].any():
        return None
    end = torch.tensor([position_ids.numel()], device=position_ids.device)
    return torch.cat([begins.flatten().nonzero().flatten(), end]).to(torch.int32)
