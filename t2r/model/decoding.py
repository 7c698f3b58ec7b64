"""One decoding step of a student as a CUDA graph.

A step is over a thousand small kernels, which the host launches more slowly than a GPU runs them. A student's states
have constant shapes, so that its step can be recorded once and replayed for every token, which a growing cache does not
allow.
"""

import itertools
from typing import Any

import torch
from torch import Tensor

from t2r.model.cache import RecurrentLayer, StudentCache

_GROWING_ROPE = ("dynamic", "longrope")  # their frequencies depend on the length: the host reads it from the device


def can_record(model: Any, cache: Any) -> bool:
    """Whether steps of `model` on `cache` may run as a `RecordedStep`: a student on one GPU, a mixer in every layer."""
    return (
        isinstance(cache, StudentCache)
        and model.device.type == "cuda"
        and all(isinstance(layer, RecurrentLayer) for layer in cache.layers)
        and len(set(getattr(model, "hf_device_map", {}).values())) <= 1
        and model.base_model.rotary_emb.rope_type not in _GROWING_ROPE
    )


class RecordedStep:
    """Called as the model would be, with the same result; for one generation only.

    The first call with one token per row runs as it is (kernels are compiled and tuned in it), the second is recorded,
    and every later one replays it; calls with more tokens are the model's own. Logits are overwritten by the next call.
    Between calls nobody else may put tensors into the cache, and weights may change in place but not move.

    Args:
        model: a student for which `can_record` holds.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.warm = False
        self.graph: Any = None
        self.inputs: dict[str, Tensor] = {}
        self.output: Any = None

    def __call__(self, input_ids: Tensor, past_key_values: StudentCache, **kwargs: Any) -> Any:
        """As the model's forward, by keywords."""
        if input_ids.shape[1] > 1 or not self.warm:
            self.warm = input_ids.shape[1] == 1
            return self.model(input_ids=input_ids, past_key_values=past_key_values, **kwargs)
        inputs = {"input_ids": input_ids}
        if kwargs.get("position_ids") is not None:
            inputs["position_ids"] = kwargs.pop("position_ids")
        if kwargs.get("attention_mask") is not None:
            inputs["attention_mask"] = kwargs.pop("attention_mask")[:, -1:]  # the rest is in the states
        if self.graph is None:
            self._record(inputs, past_key_values, kwargs)
        else:
            for name, x in inputs.items():
                self.inputs[name].copy_(x)
        self.graph.replay()
        past_key_values.columns += 1
        return self.output

    def _record(self, inputs: dict[str, Tensor], cache: StudentCache, kwargs: dict[str, Any]) -> None:
        self.inputs = {name: x.clone() for name, x in inputs.items()}
        columns, kept = cache.columns, _tensors(cache)
        self.graph = torch.cuda.CUDAGraph()
        # other threads may allocate meanwhile
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.output = self.model(**self.inputs, past_key_values=cache, **kwargs)
            _keep_in_place(cache, kept)
        cache.columns = columns  # recording runs nothing


def _tensors(cache: StudentCache) -> list[Tensor]:
    """The tokens seen, then every layer's states."""
    states = [layer.recurrent_states.values() for layer in cache.layers if isinstance(layer, RecurrentLayer)]
    assert cache.seen is not None
    return [cache.seen, *itertools.chain.from_iterable(states)]


def _keep_in_place(cache: StudentCache, kept: list[Tensor]) -> None:
    """Where a step made new tensors, bring them to where the next one reads them."""
    for old, new in zip(kept, _tensors(cache), strict=True):
        if new is not old:
            old.copy_(new)
    rest = iter(kept)
    cache.seen = next(rest)
    for layer in cache.layers:
        assert isinstance(layer, RecurrentLayer)
        layer.store(tuple(next(rest) for _ in layer.recurrent_states))
