"""Multi-query associative recall (MQAR; Zoology, arXiv 2312.04927), in the setting of the GSA paper.

A sequence lists K pairs of a key and a value, then asks for the keys again, more often soon than late; the model names
the value at each. Small models are trained from scratch on it: accuracy against width shows what a mixer's state holds.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor
from tqdm.auto import tqdm

from t2r_evals.report.svg import Series, line_chart
from t2r_evals.schema import Record

logger = logging.getLogger(__name__)

IGNORED = -100
PAPER_LEARNING_RATES = (1e-4, 10**-3.333333, 10**-2.666667, 1e-2)  # logspace(-4, -2, 4)


class MqarOptions(Record):
    """Defaults: the hardest setting of the GSA paper.

    Args:
        vocabulary: V; keys are 1..V/2-1, values V/2..V-1, 0 is filler.
        length, pairs: T and K; 4 K <= T.
        power: a of the weight i^(a-1) with which slot i of the second part asks.
        random_filler: random tokens where nothing is asked; otherwise 0.
        epochs: passes over `train_examples`; training stops early at `enough` accuracy.
    """

    vocabulary: int = Field(8192, ge=4)
    length: int = Field(512, ge=4)
    pairs: int = Field(64, ge=1)
    power: float = Field(0.01, gt=0)
    random_filler: bool = True
    train_examples: int = Field(100_000, ge=1)
    test_examples: int = Field(3_000, ge=1)
    epochs: int = Field(64, ge=1)
    batch_size: int = Field(256, ge=1)
    weight_decay: float = 0.1
    enough: float = 0.999
    seed: int = 0

    @model_validator(mode="after")
    def _fits(self) -> "MqarOptions":
        if 4 * self.pairs > self.length:
            raise ValueError(f"pairs: {self.pairs} pairs need a length of at least {4 * self.pairs}, not {self.length}")
        if self.pairs > self.vocabulary // 2 - 1:
            raise ValueError(f"pairs: a vocabulary of {self.vocabulary} has {self.vocabulary // 2 - 1} keys")
        return self


class MqarResult(Record):
    """One trained model. `accuracy` is over all queries of the test set, `curve` after each epoch."""

    mixer: str
    width: int
    lr: float
    accuracy: float
    curve: list[float]
    parameters: int
    seconds: float


def make_examples(count: int, options: MqarOptions, seed: int, device: Any = "cpu") -> tuple[Tensor, Tensor]:
    """Inputs [count, T] and labels [count, T], int64; labels are IGNORED except where a key is asked for."""
    generator = torch.Generator(device).manual_seed(seed)
    half, pairs = options.vocabulary // 2, options.pairs
    slots = (options.length - 2 * pairs) // 2

    def distinct(choices: int, weights: Tensor | None = None) -> Tensor:
        """[count, pairs] distinct numbers below `choices`: the largest of Gumbel-perturbed log weights."""
        noise = -torch.log(-torch.log(torch.rand(count, choices, generator=generator, device=device)))
        return (noise if weights is None else noise + weights).topk(pairs, dim=1).indices

    keys, values = 1 + distinct(half - 1), half + distinct(half)
    order = torch.arange(1, slots + 1, device=device, dtype=torch.float32)
    asked_at = 2 * pairs + 2 * distinct(slots, (options.power - 1) * order.log())
    if options.random_filler:
        inputs = torch.randint(options.vocabulary, (count, options.length), generator=generator, device=device)
    else:
        inputs = torch.zeros(count, options.length, dtype=torch.int64, device=device)
    inputs[:, 0 : 2 * pairs : 2] = keys
    inputs[:, 1 : 2 * pairs : 2] = values
    inputs.scatter_(1, asked_at, keys)
    labels = torch.full_like(inputs, IGNORED).scatter_(1, asked_at, values)
    return inputs, labels


def train(
    model: Any, options: MqarOptions, lr: float, *, mixer: str = "", width: int = 0, device: Any = "cpu"
) -> MqarResult:
    """Train `model` (ids [B, T] -> an output with .logits [B, T, V]) with AdamW and a cosine to zero, and test it."""
    start = time.perf_counter()
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=options.weight_decay)
    steps = options.epochs * math.ceil(options.train_examples / options.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    train_set = make_examples(options.train_examples, options, options.seed, device)
    test_set = make_examples(options.test_examples, options, options.seed + 1, device)
    order = torch.Generator().manual_seed(options.seed)
    curve: list[float] = []
    progress = tqdm(range(options.epochs), desc=f"{mixer} width {width} lr {lr:.1e}", leave=False, disable=None)
    for _ in progress:
        model.train()
        for inputs, labels in _batches(
            train_set, options.batch_size, torch.randperm(len(train_set[0]), generator=order)
        ):
            with _autocast(device):
                asked = labels != IGNORED
                # Only where a key is asked: the logits of all positions would be most of the memory.
                loss = torch.nn.functional.cross_entropy(_logits(model, inputs, asked).float(), labels[asked])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        curve.append(accuracy(model, test_set, options.batch_size, device))
        progress.set_postfix(accuracy=f"{curve[-1]:.3f}")
        if curve[-1] >= options.enough:
            break
    return MqarResult(
        mixer=mixer,
        width=width,
        lr=lr,
        accuracy=curve[-1],
        curve=curve,
        parameters=sum(p.numel() for p in model.parameters()),
        seconds=time.perf_counter() - start,
    )


@torch.inference_mode()
def accuracy(model: Any, examples: tuple[Tensor, Tensor], batch_size: int, device: Any = "cpu") -> float:
    """Share of queries whose value is the likeliest token."""
    model.eval()
    right = count = 0
    for inputs, labels in _batches(examples, batch_size, torch.arange(len(examples[0]))):
        asked = labels != IGNORED
        with _autocast(device):
            found = _logits(model, inputs, asked).argmax(-1)
        right += int((found == labels[asked]).sum())
        count += int(asked.sum())
    return right / count


def sweep(
    build: Callable[[str, int], Any],
    mixers: Sequence[str],
    widths: Sequence[int],
    options: MqarOptions,
    *,
    learning_rates: Sequence[float] = PAPER_LEARNING_RATES,
    device: Any = "cpu",
) -> list[MqarResult]:
    """The best learning rate of each mixer and width; `build(mixer, width)` makes an untrained model.

    Learning rates are tried from the second on: it is the one that most often suffices, and a row ends as soon as one
    reaches `options.enough`.
    """
    best = []
    ordered = [*learning_rates[1:], *learning_rates[:1]]
    for mixer in mixers:
        for width in widths:
            tried: list[MqarResult] = []
            for lr in ordered:
                torch.manual_seed(options.seed)
                tried.append(train(build(mixer, width), options, lr, mixer=mixer, width=width, device=device))
                logger.info("%s width %d lr %.1e: accuracy %.4f", mixer, width, lr, tried[-1].accuracy)
                if tried[-1].accuracy >= options.enough:
                    break
            best.append(max(tried, key=lambda result: result.accuracy))
    return best


def draw(results: Sequence[MqarResult], options: MqarOptions) -> str:
    """Accuracy against width as SVG."""
    mixers = list(dict.fromkeys(result.mixer for result in results))
    series = []
    for color, mixer in enumerate(mixers):
        mine = sorted((r for r in results if r.mixer == mixer), key=lambda r: r.width)
        series.append(Series(mixer, [r.width for r in mine], [100 * r.accuracy for r in mine], color % 8))
    return line_chart(
        series,
        title=f"MQAR, {options.length} tokens, {options.pairs} pairs: accuracy by width",
        x_label="width (log scale)",
        y_label="accuracy, %",
        x_log=True,
        from_zero=True,
    )


def _logits(model: Any, inputs: Tensor, asked: Tensor) -> Tensor:
    """[asked positions, V]; through the body and the head apart where the model has them."""
    if hasattr(model, "model") and hasattr(model, "lm_head"):
        return model.lm_head(model.model(input_ids=inputs, use_cache=False).last_hidden_state[asked])
    return model(inputs).logits[asked]


def _batches(examples: tuple[Tensor, Tensor], size: int, order: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for rows in order.to(examples[0].device).split(size):
        yield examples[0][rows], examples[1][rows]


def _autocast(device: Any) -> Any:
    return torch.autocast("cuda", torch.bfloat16) if torch.device(device).type == "cuda" else nullcontext()
