"""Softmax attention: the host's own (no window), or over the first `sinks` and the last `window` tokens.

Sinks with a window are StreamingLLM's attention pattern (Xiao et al., arXiv 2309.17453), here without moving the
positions: keys keep the rotation they were made with. It is what a clocked `gsa` starts as, and its control.
"""

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from transformers import PreTrainedConfig

from t2r.model.mixers.base import Mixer, MixerOptions, Rotary, head_shape, model_dtype, rotate
from t2r.model.mixers.window import Window
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
