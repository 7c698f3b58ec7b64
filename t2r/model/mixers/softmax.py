"""Softmax attention: the host's own (no window), or over the first `sinks` and the last `window` tokens.

Sinks with a window are StreamingLLM's attention pattern (Xiao et al., arXiv 2309.17453), here without moving the
positions: keys keep the rotation they were made with. It is what a clocked `gsa` starts as, and its control.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor
from transformers import PreTrainedConfig

from t2r.model.mixers.base import Mixer, MixerOptions, Rotary, States, head_shape, model_dtype, rotate
from t2r.model.mixers.gsa import written_slot
from t2r.model.sequence import SequenceInfo


class SoftmaxOptions(MixerOptions):
    """Options of `softmax`."""

    name: Literal["softmax"] = "softmax"
    window: int | None = Field(None, ge=1, description="how many last tokens are seen; null keeps the host's attention")
    sinks: int = Field(0, ge=0, description="how many first tokens stay visible beside the window")

    @model_validator(mode="after")
    def _fit(self) -> "SoftmaxOptions":
        if self.sinks and self.window is None:
            raise ValueError(f"sinks {self.sinks}: needs a window")
        return self


class SoftmaxMixer(Mixer):
    """Attention over sinks and window. Its cache is S + R keys and values, each in the slot that the clock names, so
    decoding memory is as constant as a recurrent mixer's."""

    options_class: ClassVar[type[MixerOptions]] = SoftmaxOptions

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Rotary,
        attention_mask: SequenceInfo,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """As `Mixer.forward`."""
        layer = self.cache_layer(past_key_values)
        q, k, v = self.project(hidden_states)
        q, k = rotate(q, k, position_embeddings)
        shape = Window(self.options.sinks, self.options.window)
        o, states = shape.attend(q, k, v, attention_mask, layer and layer.states, layer is not None, self.scaling)
        if layer is not None:
            layer.store(states)
        return self.o_proj(o.flatten(2)), None

    @classmethod
    def state_shapes(cls, config: PreTrainedConfig, options: SoftmaxOptions) -> list[tuple[int, ...]]:
        """As `Mixer.state_shapes`: keys and values. Without a window there is no state of constant size."""
        _, heads, dim = head_shape(config)
        return [] if options.window is None else [(heads, options.sinks + options.window, dim)] * 2

    @classmethod
    def state_dtype(cls, config: PreTrainedConfig) -> torch.dtype:
        """As `Mixer.state_dtype`: keys and values are kept as they were computed."""
        return model_dtype(config)


@dataclass(frozen=True)
class Window:
    """Attention over the first `sinks` and the last `size` tokens."""

    sinks: int
    size: int

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
        return o.transpose(1, 2), self._write(states, k, v, info) if keep else None

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
