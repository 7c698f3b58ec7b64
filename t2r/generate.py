"""Continue a prompt token by token, in memory that does not grow with its length."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from t2r.errors import InputError
from t2r.model import StudentCache
from t2r.model.decoding import RecordedStep, can_record

PREFILL_TOKENS = 4096  # a longer prompt goes through the model in pieces of this many tokens
_CONTEXT = 8  # tokens before a new one that may change how it is spelled


@dataclass
class Statistics:
    """Filled while text is generated.

    Attributes:
        prompt_tokens: of the prompt, special tokens included.
        new_tokens: generated so far, the end-of-text token included.
        prefill_seconds: for the prompt, up to its last logits.
        decode_seconds: for the new tokens, the time between them that the caller took left out.
        state_bytes: of the cache at the end.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    state_bytes: int = 0


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    top_p: float = 0.95,
    top_k: int = 0,
    seed: int = 0,
    statistics: Statistics | None = None,
) -> Iterator[str]:
    """Yield the continuation of `prompt` piece by piece; together the pieces are its text, without the prompt.

    Args:
        model: a student or a teacher (whose cache grows with every token).
        max_new_tokens: stop after these, or at the model's end-of-text token.
        temperature: of the sampling; 0 takes the most likely token always.
        top_p: sample from the smallest set of tokens of this probability; 1 from all.
        top_k: sample from so many most likely tokens; 0 from all.
        seed: of the sampling.
        statistics: filled as it goes.

    Raises:
        InputError: an empty prompt for a tokenizer that adds no beginning-of-text token.
    """
    told = statistics if statistics is not None else Statistics()
    ids = tokenizer(prompt, return_tensors="pt", verbose=False)["input_ids"].to(model.device)
    if ids.shape[1] == 0:
        raise InputError("prompt: empty, and the tokenizer adds no beginning-of-text token to start from")
    pick = _sampler(temperature, top_p, top_k, torch.Generator(model.device).manual_seed(seed))
    ends = _end_tokens(model)
    spelling = Spelling(tokenizer, ids[0, -_CONTEXT:].tolist())
    told.prompt_tokens = ids.shape[1]
    start = time.perf_counter()
    cache = None
    for piece in ids.split(PREFILL_TOKENS, 1):
        logits, cache = _forward(model, piece, cache)
    token = pick(logits)
    told.prefill_seconds = time.perf_counter() - start
    step = RecordedStep(model) if can_record(model, cache) else model
    for count in range(1, max_new_tokens + 1):
        told.new_tokens = count
        number = int(token)
        if number not in ends and (text := spelling.add(number)):
            yield text
        if number in ends or count == max_new_tokens:
            break
        start = time.perf_counter()
        logits, cache = _forward(step, token[None], cache)
        token = pick(logits)
        told.decode_seconds += time.perf_counter() - start
    told.state_bytes = _bytes(cache)
    if rest := spelling.finish():
        yield rest


@torch.inference_mode()
def _forward(model: Any, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """Logits [1, vocabulary] after the last of `ids` [1, T], and the cache after them."""
    output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return output.logits[:, -1].float(), output.past_key_values


def _sampler(temperature: float, top_p: float, top_k: int, generator: torch.Generator) -> Any:
    """A function from logits [1, vocabulary] to the next token [1]."""
    if temperature == 0:
        return lambda logits: logits.argmax(-1)
    warpers: list[Any] = [TemperatureLogitsWarper(float(temperature))]
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))

    def pick(logits: Tensor) -> Tensor:
        for warper in warpers:
            logits = warper(None, logits)
        return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]

    return pick


def _end_tokens(model: Any) -> set[int]:
    ends = model.generation_config.eos_token_id
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


def _bytes(cache: Any) -> int:
    if isinstance(cache, StudentCache):
        return cache.state_bytes()
    return sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))


class Spelling:
    """Turns tokens into text one at a time: how a token is spelled may depend on those before it, and a character may
    need several tokens. Only the tokens since the last finished piece are kept."""

    def __init__(self, tokenizer: Any, context: list[int]) -> None:
        self.tokenizer = tokenizer
        self.ids, self.told = context, len(context)

    def add(self, token: int) -> str:
        """The text that this token completes; empty in the middle of a character."""
        self.ids.append(token)
        text = self._new_text()
        if text.endswith("\ufffd"):
            return ""
        self.ids = self.ids[-_CONTEXT:]
        self.told = len(self.ids)
        return text

    def finish(self) -> str:
        """The text of an unfinished character at the end."""
        return self._new_text() if self.told < len(self.ids) else ""

    def _new_text(self) -> str:
        before, after = (
            self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for ids in (self.ids[: self.told], self.ids)
        )
        return after[len(before) :]
