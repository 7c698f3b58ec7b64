"""What every mixer is: options, a module built from the host's attention, a state of constant size."""

import difflib
import math
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from t2r.model.sequence import SequenceInfo

Rotary = tuple[Tensor, Tensor]
States = tuple[Tensor, ...]


def _one_layer(value: Any) -> Any:
    """YAML reads `layers: 5` as a number."""
    return str(value) if type(value) is int else value


class MixerOptions(BaseModel):
    """Options of a mixer; each kind adds its own. In a recipe they also say which layers they are for.

    Types are strict (true is no number, "16" no integer); an integer may stand for a float.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    name: str
    layers: Annotated[str, BeforeValidator(_one_layer)] = Field(
        "all", description='"all", "0,2,5-9" or "all except 2,5"'
    )

    def stored(self) -> dict[str, Any]:
        """What the student's configuration keeps for one layer: everything but `layers`, in JSON's types."""
        return self.model_dump(mode="json", exclude={"layers"})


class Mixer(nn.Module):
    """Replaces the attention of one layer and keeps its call signature and its parameters' names.

    Args:
        attention: the host's attention module, whose projections (and q/k norms, where the host has them) are adopted.
        config: the student's configuration.
        options: the mixer's options.
        layer_idx: the layer's number, which is also its place in the cache.
    """

    options_class: ClassVar[type[MixerOptions]]
    adopted: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module

    def __init__(self, attention: nn.Module, config: PreTrainedConfig, options: Any, layer_idx: int) -> None:
        super().__init__()
        self.config, self.options, self.layer_idx = config, options, layer_idx
        for name in self.adopted:
            if hasattr(attention, name):
                setattr(self, name, getattr(attention, name))
        self.query_heads, self.heads, self.head_dim = head_shape(config)
        self.scaling: float = attention.scaling  # type: ignore[assignment]

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Rotary,
        attention_mask: SequenceInfo,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Mix the tokens of [B, T, hidden] causally; the same shape comes back, and None for attention weights."""
        raise NotImplementedError

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, T, HQ, D], k and v [B, T, H, D], as the host makes them, before the positions."""
        q, k, v = (
            layer(hidden_states).unflatten(-1, (-1, self.head_dim)) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def cache_layer(self, past_key_values: Any) -> Any:
        """This layer's place in the cache, or None without a cache."""
        return None if past_key_values is None else past_key_values.layers[self.layer_idx]

    def new_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that the host does not have, by name relative to the mixer."""
        return {name: p for name, p in self.named_parameters() if name.split(".")[0] not in self.adopted}

    def initial_values(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Starting values of exactly the new parameters, float32 on the CPU, the same for the same generator."""
        return {}

    def components(self) -> dict[str, nn.Module]:
        """The module of each path from q, k and v to o by name, where there are several: each can be switched off."""
        return {}

    def drops(self) -> list[str]:
        """Names of the host attention's tensors that the mixer does not keep."""
        return []

    @classmethod
    def state_shapes(cls, config: PreTrainedConfig, options: Any) -> list[tuple[int, ...]]:
        """Shapes of the states that one sequence needs in one layer."""
        raise NotImplementedError

    @classmethod
    def state_dtype(cls, config: PreTrainedConfig) -> torch.dtype:
        """The states' dtype."""
        return torch.float32

    @classmethod
    def state_bytes(cls, config: PreTrainedConfig, options: Any) -> int:
        """Bytes of the states of one sequence in one layer."""
        return sum(map(math.prod, cls.state_shapes(config, options))) * cls.state_dtype(config).itemsize

    @classmethod
    def make_cache_layer(cls, config: PreTrainedConfig, options: Any) -> Any:
        """An empty cache layer for this kind of mixer."""
        from t2r.model.cache import RecurrentLayer

        return RecurrentLayer()


class RMSNorm(nn.RMSNorm):
    """RMSNorm whose weight follows its input's dtype, as autocast has it for matrices: of two dtypes torch has no fused
    kernel."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] normed over its last dimension."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class RecurrentMixer(Mixer):
    """A mixer that is a linear recurrence; a kind says what goes into it, how it runs and what comes out."""

    def inputs(
        self, hidden_states: Tensor, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary, info: SequenceInfo
    ) -> States:
        """The recurrence's inputs, each [B, T, ...], from the layer's input and its projections; every padding token
        is made to leave the state untouched."""
        raise NotImplementedError

    def scan(
        self, inputs: States, state: States | None, output_final_state: bool, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, States | None]:
        """o [B, T, HQ, V] and, when asked for, the final states."""
        raise NotImplementedError

    def step(self, inputs: States, state: States) -> Tensor:
        """One token: inputs [B, ...] to o [B, HQ, V]; `state` is overwritten."""
        raise NotImplementedError

    def finish(self, o: Tensor) -> Tensor:
        """From o [B, T, HQ, V] to what o_proj takes, [B, T, HQ * V]."""
        return o.flatten(2)

    def run(self, inputs: States, state: States | None, keep: bool, info: SequenceInfo) -> tuple[Tensor, States | None]:
        """o [B, T, HQ, V] and, with `keep`, the states after the last token."""
        if info.cu_seqlens is not None:
            flat = tuple(x.flatten(0, 1)[None] for x in inputs)
            o, _ = self.scan(flat, None, False, info.cu_seqlens)
            return o[0].unflatten(0, info.position.shape), None
        if state is not None and inputs[0].shape[1] == 1 and not torch.is_grad_enabled():
            return self.step(tuple(x[:, 0] for x in inputs), state)[:, None], state
        return self.scan(inputs, state, keep, None)

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
        inputs = self.inputs(hidden_states, *self.project(hidden_states), position_embeddings, attention_mask)
        o, states = self.run(inputs, layer and layer.states, layer is not None, attention_mask)
        if layer is not None:
            layer.store(states)
        return self.o_proj(self.finish(o)), None


def rotate(q: Tensor, k: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
    """The host's rotary positions on q [B, T, HQ, D] and k [B, T, H, D], in their own dtype: under autocast a host's
    cosines may be wider, and v is not."""
    rotated_q, rotated_k = apply_rotary_pos_emb(q, k, *rotary, unsqueeze_dim=2)
    return rotated_q.to(q.dtype), rotated_k.to(k.dtype)


def head_shape(config: PreTrainedConfig) -> tuple[int, int, int]:
    """HQ, H and D of a host or student."""
    query_heads = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // query_heads
    return query_heads, config.num_key_value_heads, dim


def model_dtype(config: PreTrainedConfig) -> torch.dtype:
    """The dtype that the configuration names for the weights, float32 when it names none."""
    dtype = config.dtype
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32


def layer_generator(seed: int, layer: int) -> torch.Generator:
    """The generator from which the new parameters of `layer` start."""
    return torch.Generator().manual_seed((seed * 1_000_003 + layer) % 2**63)


def nearest(word: str, known: list[str]) -> str:
    """' (did you mean X?)', or nothing when no known word is near."""
    found = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""
