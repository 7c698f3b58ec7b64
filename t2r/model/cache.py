"""The student's cache: a constant-size state where a mixer is, the host's own growing layer where it is not."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from t2r.model.mixers import MIXERS, parse_options
from t2r.model.sequence import SequenceInfo


class RecurrentLayer(LinearAttentionLayer):
    """The state of one mixer: as many tensors [B, ...] as its kind of mixer has.

    transformers' own layer holds them, but the number of states is fixed here by what the mixer stores, and a stored
    state replaces the old one without a copy, so that gradients may flow through it.
    """

    is_compileable = False  # generate would prepare 4D masks, which a recurrent state has no use for
    is_croppable = False  # type: ignore[assignment]  # a recurrence cannot be rolled back

    def __init__(self) -> None:
        super().__init__()
        self.recurrent_states: dict[int, Tensor] = {}  # type: ignore[assignment]

    @property
    def states(self) -> tuple[Tensor, ...] | None:
        """The stored states, or None before the first token. Decoding steps may write into them."""
        return tuple(self.recurrent_states.values()) or None

    def store(self, states: tuple[Tensor, ...]) -> None:
        """Keep the states after the last token."""
        self.recurrent_states = dict(enumerate(states))

    def reset(self) -> None:
        """Forget everything."""
        self.recurrent_states = {}

    def crop(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError("crop: a recurrent state cannot be rolled back")

    def offload(self) -> None:
        """Nothing: the state is small and read at every token."""

    def prefetch(self) -> None:
        """Nothing, as `offload`."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Pick rows in beam search."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`."""
        self.store(tuple(x.index_select(0, indices.to(x.device)) for x in self.recurrent_states.values()))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self.store(tuple(x.repeat_interleave(repeats, dim=0) for x in self.recurrent_states.values()))


class StudentCache(DynamicCache):
    """One layer per decoder layer, and two counts: columns seen (with padding) and real tokens seen per row.

    Args:
        config: a student's configuration.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config = config
        # DynamicCache would infer the layers from `layer_types`, which speak of the host alone
        Cache.__init__(self, layers=_cache_layers(config))
        self.columns = 0
        self.seen: Tensor | None = None

    def advance(self, info: SequenceInfo) -> None:
        """Count the tokens of a forward that has just gone through all layers."""
        batch, length = info.position.shape
        new = torch.full((batch,), length, device=info.position.device) if info.mask is None else info.mask.sum(1)
        self.seen = new if self.seen is None else self.seen + new
        self.columns += length

    def tokens_seen(self, batch: int, device: torch.device) -> Tensor:
        """[B] int64: the real tokens of each row so far."""
        return torch.zeros(batch, dtype=torch.int64, device=device) if self.seen is None else self.seen

    def state_bytes(self) -> int:
        """Bytes that the layers hold at the moment, for all rows together."""
        tensors: list[Tensor] = []
        for layer in self.layers:
            tensors += layer.recurrent_states.values() if isinstance(layer, RecurrentLayer) else _keys_and_values(layer)
        return sum(x.numel() * x.element_size() for x in tensors)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen, padding included, whatever the layer."""
        return self.columns

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask for `layer_idx` covers."""
        layer = self.layers[layer_idx]
        if isinstance(layer, RecurrentLayer):
            return self.columns + query_length, 0
        return layer.get_mask_sizes(query_length)  # type: ignore[union-attr]

    def reset(self) -> None:
        """Forget everything."""
        self.layers = _cache_layers(self.config)  # transformers before 5.18 zeroes a growing layer and keeps its length
        self.columns, self.seen = 0, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Pick rows in beam search."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`."""
        super().batch_select_indices(indices)
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        self.seen = None if self.seen is None else self.seen.repeat_interleave(repeats)

    def _select(self, indices: Tensor) -> None:
        self.seen = None if self.seen is None else self.seen.index_select(0, indices.to(self.seen.device))


def softmax_kind(config: PreTrainedConfig, layer: int) -> str:
    """Which softmax attention the host has at `layer`: "full_attention" or "sliding_attention"."""
    if config.model_type.removeprefix("t2r_") in ("qwen2", "qwen3"):
        return config.layer_types[layer]
    return "sliding_attention" if getattr(config, "sliding_window", None) is not None else "full_attention"


def _cache_layers(config: PreTrainedConfig) -> list[Any]:
    return [_cache_layer(config, index) for index in range(config.num_hidden_layers)]


def _cache_layer(config: PreTrainedConfig, index: int) -> Any:
    entry = config.mixers[index]
    if entry is not None:
        return MIXERS[entry["name"]].make_cache_layer(config, parse_options(entry))
    if softmax_kind(config, index) == "sliding_attention":
        return DynamicSlidingWindowLayer(sliding_window=config.sliding_window)
    return DynamicLayer()


def _keys_and_values(layer: Any) -> list[Tensor]:
    return [layer.keys, layer.values] if layer.is_initialized else []
