"""Speed and memory as a user of `generate` feels them: time to the first token, decoding rate, peak memory."""

import gc
import logging
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from t2r_evals.schema import SpeedPoint

logger = logging.getLogger(__name__)
_LONG = 3.0  # seconds


def measure_speed(
    model: Any,
    contexts: Sequence[int],
    *,
    decode_tokens: int | None = None,
    largest_batch: int = 1,
    repeats: int = 3,
    seed: int = 0,
    **options: Any,
) -> Iterator[SpeedPoint]:
    """Yield prefill and decoding at each context length, with batch 1 and the largest batch that fits.

    The prompt is random tokens: the arithmetic does not depend on what they say. Every figure is the fastest of
    `repeats` after one warm-up of the same lengths, greedy decoding by `model.generate`, its overhead included.

    Args:
        contexts: prompt lengths in tokens.
        decode_tokens: tokens that the decoding rate is measured over; by default 128 on a GPU, where a student spends
            the first two on recording its step, and 32 elsewhere.
        largest_batch: on a GPU, batches are doubled up to this as long as they fit; 1 measures batch 1 alone.
        repeats: at most; no further one is started after three seconds.
        options: further settings of `generate`.
    """
    if decode_tokens is None:
        decode_tokens = 128 if model.device.type == "cuda" else 32
    progress = tqdm(contexts, desc="speed", unit="context", leave=False, disable=None)
    for context in progress:
        batch = 1
        best: SpeedPoint | None = None
        while batch <= largest_batch:
            try:
                point = _measure(model, context, batch, decode_tokens, repeats, seed, options)
            except torch.OutOfMemoryError:
                logger.warning("context %d, batch %d does not fit into the device's memory", context, batch)
                break
            finally:
                empty(model.device)
            if batch == 1:
                yield point
            best = point
            batch *= 2
        if best is not None and best.batch > 1:
            yield best
    progress.close()


def crossover(contexts: Sequence[int], student: Sequence[float], teacher: Sequence[float]) -> float | None:
    """The context from which on the student stays at or below the teacher, in seconds or bytes.

    Args:
        contexts: rising.
        student, teacher: positive, one for each context.

    Returns:
        between two measured contexts, what straight lines in logarithms give; the first context when the student is
        never above; None when it is above at the last.
    """
    gap = [math.log(mine / other) for mine, other in zip(student, teacher, strict=True)]
    above = [index for index, value in enumerate(gap) if value > 0]
    if not above:
        return contexts[0]
    if (last := above[-1]) == len(contexts) - 1:
        return None
    share = gap[last] / (gap[last] - gap[last + 1])
    return math.exp((1 - share) * math.log(contexts[last]) + share * math.log(contexts[last + 1]))


def _measure(
    model: Any, context: int, batch: int, decode_tokens: int, repeats: int, seed: int, options: dict[str, Any]
) -> SpeedPoint:
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(model.config.vocab_size, (batch, context), generator=generator).to(model.device)
    on_gpu = model.device.type == "cuda"
    # As many tokens as are timed: cuDNN's attention plans every new length of a growing cache, 40 ms at each token.
    _generate(model, prompt, 1 + decode_tokens, options)
    empty(model.device)
    resting = torch.cuda.memory_allocated(model.device) if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(model.device)
    first: list[float] = []
    decode: list[float] = []
    cache = 0
    start = time.perf_counter()
    while len(first) < repeats and (not first or time.perf_counter() - start < _LONG):
        times, cache = _generate(model, prompt, 1 + decode_tokens, options)
        first.append(times[0])
        decode.append(times[-1] - times[0])
    peak = torch.cuda.max_memory_allocated(model.device) - resting if on_gpu else None
    return SpeedPoint(
        context=context,
        batch=batch,
        prefill_tokens_per_second=batch * context / min(first),
        decode_tokens_per_second=batch * decode_tokens / min(decode),
        first_token_seconds=min(first),
        peak_bytes=peak,
        state_bytes=cache,
    )


def _generate(model: Any, prompt: torch.Tensor, tokens: int, options: dict[str, Any]) -> tuple[list[float], int]:
    """Seconds from the call to each of exactly `tokens` new tokens, and the bytes of the cache afterwards."""
    from transformers import GenerationConfig, StoppingCriteriaList

    times: list[float] = []

    def note_time(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        _wait(model)
        times.append(time.perf_counter() - start)
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    config = GenerationConfig(
        max_new_tokens=tokens,
        min_new_tokens=tokens,  # generate fills an unset end-of-text token from the model's own settings
        do_sample=False,
        pad_token_id=0,
        use_cache=True,
        return_dict_in_generate=True,
        **options,
    )
    _wait(model)
    start = time.perf_counter()
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        generation_config=config,
        stopping_criteria=StoppingCriteriaList([note_time]),
    )
    assert len(times) == tokens, "generate stopped early"
    return times, cache_bytes(output.past_key_values)


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys, values or states that a transformers cache holds, whatever its layers are (its counters,
    integer tensors of a few bytes, left out)."""
    seen: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            seen[id(value)] = value.numel() * value.element_size()
        elif isinstance(value, dict):
            for item in value.values():
                visit(item)
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item)

    for layer in cache.layers:
        visit(vars(layer))
    return sum(seen.values())


def _wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def empty(device: torch.device) -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
