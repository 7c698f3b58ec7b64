"""Softmax attention: the host's own (no window), or over the first `sinks` and the last `window` tokens.

Sinks with a window are StreamingLLM's attention pattern (Xiao et al., arXiv 2309.17453), here without moving the
positions: keys keep the rotation they were made with. It is what a clocked `gsa` starts as, and its control.
"""

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import PreTrainedConfig

from t2r.model.mixers.base import Mixer, MixerOptions, Rotary, States, head_shape, model_dtype, rotate
from t2r.model.mixers.groups import HeadSizes, head_groups, join_heads, split_heads
from t2r.model.mixers.window import Window
from t2r.model.sequence import SequenceInfo


class SoftmaxOptions(MixerOptions):
    """Options of `softmax`."""

    name: Literal["softmax"] = "softmax"
    window: HeadSizes | None = Field(
        None,
        description="how many last tokens are seen: by every key/value head, or a list with one number for each; null "
        "keeps the host's attention",
    )
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

    def __init__(self, attention: nn.Module, config: PreTrainedConfig, options: SoftmaxOptions, layer_idx: int) -> None:
        super().__init__(attention, config, options, layer_idx)
        assert options.window is not None, "without a window the layer keeps the host's attention"
        self.groups = head_groups(options.window, self.heads, "softmax: window")
        self.windows = [Window(options.sinks, group.size) for group in self.groups]

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
        heads = [split_heads(x, self.groups) for x in (*rotate(q, k, position_embeddings), v)]
        before = layer and layer.states
        outputs: list[Tensor] = []
        after: States = ()
        for index, (window, q, k, v) in enumerate(zip(self.windows, *heads, strict=True)):
            states = before and before[2 * index : 2 * index + 2]
            o, states = window.attend(q, k, v, attention_mask, states, layer is not None, self.scaling)
            outputs.append(o)
            after += states or ()
        if layer is not None:
            layer.store(after)
        return self.o_proj(join_heads(outputs, self.groups).flatten(2)), None

    @classmethod
    def state_shapes(cls, config: PreTrainedConfig, options: SoftmaxOptions) -> list[tuple[int, ...]]:
        """As `Mixer.state_shapes`: keys and values. Without a window there is no state of constant size."""
        _, heads, dim = head_shape(config)
        groups = [] if options.window is None else head_groups(options.window, heads, "softmax: window")
        return [(len(group.heads), options.sinks + group.size, dim) for group in groups for _ in "KV"]

    @classmethod
    def state_dtype(cls, config: PreTrainedConfig) -> torch.dtype:
        """As `Mixer.state_dtype`: keys and values are kept as they were computed."""
        return model_dtype(config)
