"""A window of softmax attention beside a recurrence in the same layer, mixed per head by a learned share."""

from types import SimpleNamespace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import PreTrainedConfig

from t2r.model.mixers.base import Mixer, MixerOptions, RecurrentMixer, Rotary, States, head_shape, rotate
from t2r.model.mixers.gla import GLAMixer, GLAOptions
from t2r.model.mixers.gsa import GSAMixer, GSAOptions
from t2r.model.mixers.softmax import SoftmaxMixer, SoftmaxOptions
from t2r.model.mixers.window import Window
from t2r.model.sequence import SequenceInfo


class _Half(RecurrentMixer):
    """A recurrence without projections of its own. It is called as a module: tools that move or shard parameters hook
    into that call."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        projections: tuple[Tensor, Tensor, Tensor],
        rotary: Rotary,
        info: SequenceInfo,
        states: States | None,
        keep: bool,
    ) -> tuple[Tensor, States | None]:
        """What o_proj takes [B, T, HQ * V] and, with `keep`, the states after the last token."""
        o, states = self.run(self.inputs(hidden_states, *projections, rotary, info), states, keep, info)
        return self.finish(o), states


class _GSAHalf(_Half, GSAMixer):
    pass


class _GLAHalf(_Half, GLAMixer):
    pass


_HALVES: dict[str, type[_Half]] = {"gsa": _GSAHalf, "gla": _GLAHalf}


class _WindowHalf(nn.Module):
    """The window, a module too: whoever measures switches the halves off in turn."""

    def __init__(self, window: Window, scaling: float) -> None:
        super().__init__()
        self.window, self.scaling = window, scaling

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, info: SequenceInfo, states: States | None, keep: bool
    ) -> tuple[Tensor, States | None]:
        """What o_proj takes [B, T, HQ * D] and, with `keep`, the slots after the last token."""
        o, slots = self.window.attend(q, k, v, info, states, keep, self.scaling)
        return o.flatten(2), slots


class HybridOptions(MixerOptions):
    """Options of `hybrid`."""

    name: Literal["hybrid"] = "hybrid"
    recurrent: Annotated[GSAOptions | GLAOptions, Field(discriminator="name", default_factory=lambda: GSAOptions())]
    window: int = Field(64, ge=1, description="how many last tokens the softmax sees")
    sinks: int = Field(4, ge=0, description="how many first tokens it sees besides")

    @model_validator(mode="after")
    def _fit(self) -> "HybridOptions":
        if self.recurrent.layers != "all":
            raise ValueError(f"recurrent.layers {self.recurrent.layers!r}: the hybrid's own layers say where it is")
        return self

    def stored(self) -> dict[str, Any]:
        """As `MixerOptions.stored`, with the recurrence's own stored options."""
        return super().stored() | {"recurrent": self.recurrent.stored()}


class HybridMixer(Mixer):
    """o = m * window + (1 - m) * recurrence before o_proj, m = sigmoid(mix) per query head; both read the same q, k, v.

    In the manner of Based, LoLCATs and Liger (arXiv 2402.18668, 2410.10254, 2503.01496). The share starts at
    sigmoid(2) = 0.88 of the window, the half that already works.
    """

    options_class: ClassVar[type[MixerOptions]] = HybridOptions

    def __init__(self, attention: nn.Module, config: PreTrainedConfig, options: HybridOptions, layer_idx: int) -> None:
        super().__init__(attention, config, options, layer_idx)
        # without the projections, which the two halves share
        bare: Any = SimpleNamespace(scaling=attention.scaling)
        self.recurrent = _HALVES[options.recurrent.name](bare, config, options.recurrent, layer_idx)
        self.mix = nn.Parameter(torch.empty(self.query_heads))
        self.window = _WindowHalf(Window(options.sinks, options.window), self.scaling)

    def components(self) -> dict[str, nn.Module]:
        """As `Mixer.components`: the two halves."""
        return {"window": self.window, self.options.recurrent.name: self.recurrent}

    def initial_values(self, generator: torch.Generator) -> dict[str, Tensor]:
        """The recurrence's own, and mix 2."""
        inner = self.recurrent.initial_values(generator)
        mix = torch.full((self.query_heads,), 2.0, device="cpu")
        return {f"recurrent.{name}": value for name, value in inner.items()} | {"mix": mix}

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Rotary,
        attention_mask: SequenceInfo,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """As `Mixer.forward`; the states are the recurrence's, then the window's two."""
        info, layer = attention_mask, self.cache_layer(past_key_values)
        keep, states = layer is not None, layer and layer.states
        q, k, v = self.project(hidden_states)
        far, recurrent_states = self.recurrent(
            hidden_states, (q, k, v), position_embeddings, info, states and states[:-2], keep
        )
        q, k = rotate(q, k, position_embeddings)
        near, slots = self.window(q, k, v, info, states and states[-2:], keep)
        if layer is not None:
            layer.store((*(recurrent_states or ()), *(slots or ())))
        share = self.mix.float().sigmoid().to(near.dtype).repeat_interleave(self.head_dim)
        return self.o_proj(share * near + (1 - share) * far), None

    @classmethod
    def state_shapes(cls, config: PreTrainedConfig, options: HybridOptions) -> list[tuple[int, ...]]:
        """As `Mixer.state_shapes`: the recurrence's, then the window's keys and values."""
        _, heads, dim = head_shape(config)
        inner = _HALVES[options.recurrent.name].state_shapes(config, options.recurrent)
        return inner + [(heads, options.sinks + options.window, dim)] * 2

    @classmethod
    def state_bytes(cls, config: PreTrainedConfig, options: HybridOptions) -> int:
        """As `Mixer.state_bytes`; the window keeps its keys and values as they were computed."""
        window = SoftmaxOptions(sinks=options.sinks, window=options.window)
        inner = _HALVES[options.recurrent.name].state_bytes(config, options.recurrent)
        return inner + SoftmaxMixer.state_bytes(config, window)
