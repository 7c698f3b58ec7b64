"""One decoding step by itself, its kernels back to back on the device: what a generation loop could reach at best.

`generate` prepares and launches every step from Python, and a teacher's cache is copied to grow. Here a step runs again
and again on a cache that stands: a student's states, or random keys and values of so many tokens of which every step
writes the last. So long contexts and large batches need no prefill, and neither model pays for its loop.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from t2r_evals.schema import Record
from t2r_evals.speed import cache_bytes, empty

_START = 64  # tokens that bring a cache into being
_MARGIN = 0.95  # of the free memory that a cache may take; a step needs a little beside it


class StepPoint(Record):
    """A decoding step after `context` tokens: its seconds, and the cache of all rows."""

    context: int
    batch: int
    step_seconds: float
    tokens_per_second: float
    state_bytes: int


def measure_step(model: Any, context: int, batch: int, *, steps: int = 10, repeats: int = 3) -> StepPoint:
    """The fastest of `repeats` runs of `steps` steps; on a GPU as one CUDA graph, replayed.

    Raises:
        torch.OutOfMemoryError: the cache or the step does not fit.
    """
    with torch.no_grad(), _plain_attention(model):
        cache = _standing_cache(model, context, batch)
        inputs = {
            "input_ids": torch.ones(batch, 1, dtype=torch.int64, device=model.device),
            "position_ids": torch.full((batch, 1), context, device=model.device),
        }

        def step() -> None:
            model(**inputs, past_key_values=cache, use_cache=True)

        step()
        run = _recorded(step) if model.device.type == "cuda" else step
        seconds = min(_time(run, steps, model.device) for _ in range(repeats)) / steps
    return StepPoint(
        context=context,
        batch=batch,
        step_seconds=seconds,
        tokens_per_second=batch / seconds,
        state_bytes=cache_bytes(cache),
    )


def measure_largest_step(model: Any, context: int, limit: int, **options: Any) -> StepPoint:
    """`measure_step` with the largest power of two up to `limit` of sequences whose caches fit into the GPU."""
    with torch.no_grad():
        row = cache_bytes(_standing_cache(model, context, 1))
    empty(model.device)
    free = torch.cuda.mem_get_info(model.device)[0]
    batch = 1 << (min(limit, max(1, int(_MARGIN * free / row))).bit_length() - 1)
    while True:
        try:
            return measure_step(model, context, batch, **options)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        empty(model.device)
        batch //= 2


class _StandingLayer(DynamicLayer):
    """Keys and values of a fixed number of tokens, the last of which every step writes."""

    def __init__(self, like: Any, length: int) -> None:
        super().__init__()
        rows, heads, _, dim = like.keys.shape
        self.keys, self.values = (like.keys.new_empty(rows, heads, length, dim).normal_() for _ in range(2))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        self.keys[:, :, -1:] = key_states
        self.values[:, :, -1:] = value_states
        return self.keys, self.values


def _standing_cache(model: Any, context: int, batch: int) -> Any:
    ids = torch.ones(1, _START, dtype=torch.int64, device=model.device)
    cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
    cache.batch_repeat_interleave(batch)
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, DynamicSlidingWindowLayer):
            cache.layers[index] = _StandingLayer(layer, min(context, layer.sliding_window))
        elif isinstance(layer, DynamicLayer):
            cache.layers[index] = _StandingLayer(layer, context)
    return cache


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> tuple[Tensor, None]:
    """One query per row sees all keys: no mask, and none that grouped queries would have to be repeated for."""
    causal = query.shape[2] > 1
    o = F.scaled_dot_product_attention(
        query, key, value, is_causal=causal, scale=options["scaling"], enable_gqa=query.shape[1] != key.shape[1]
    )
    return o.transpose(1, 2), None


@contextmanager
def _plain_attention(model: Any) -> Iterator[None]:
    """The host's softmax layers attend by `_attend`. transformers makes masks only for what it knows."""
    AttentionInterface.register("t2r_evals_plain", _attend)
    usual = model.config._attn_implementation
    model.config._attn_implementation = "t2r_evals_plain"
    try:
        yield
    finally:
        model.config._attn_implementation = usual


def _recorded(step: Any) -> Any:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _time(run: Any, times: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(times):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
