"""What an MQAR example is: the generator of Zoology (arXiv 2312.04927), vectorised."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from t2r_evals.schema import Record

_ROWS_AT_A_TIME = 4096  # the noise over all keys of this many examples takes 64 MiB


class MqarOptions(Record):
    """Defaults: the hardest setting of the GSA paper (arXiv 2409.07146, figure 3), which is Zoology's of figure 2.

    Args:
        vocabulary: V; keys are 1..V/2-1, values V/2..V-1, 0 is filler.
        length, pairs: T and K; 4 K <= T.
        power: a of the weight i^(a-1) with which slot i of the second part asks.
        random_filler: random tokens where nothing is asked; otherwise 0, as in Zoology's figure 2.
        curriculum: lessons (T, K), in order, before the setting itself; each is left at `learned` accuracy, or after
            `patience` epochs.
        epochs: passes over `train_examples`; training stops early at `enough` accuracy.
        minutes: time for one model; the learning rate is annealed to its end where that comes before the last epoch.
        warmup: steps over which the learning rate rises from 0.
        compile: train through torch.compile, but for the lessons of a curriculum.
    """

    vocabulary: int = Field(8192, ge=4)
    length: int = Field(512, ge=4)
    pairs: int = Field(64, ge=1)
    power: float = Field(0.01, gt=0)
    random_filler: bool = False
    curriculum: tuple[tuple[int, int], ...] = ()
    learned: float = 0.9
    patience: int = Field(8, ge=1)
    train_examples: int = Field(100_000, ge=1)
    test_examples: int = Field(3_000, ge=1)
    epochs: int = Field(64, ge=1)
    minutes: float | None = Field(None, gt=0)
    batch_size: int = Field(256, ge=1)
    warmup: int = Field(0, ge=0)
    weight_decay: float = 0.1
    enough: float = 0.999
    compile: bool = False
    seed: int = 0

    @model_validator(mode="after")
    def _fits(self) -> "MqarOptions":
        if 4 * self.pairs > self.length:
            raise ValueError(f"pairs: {self.pairs} pairs need a length of at least {4 * self.pairs}, not {self.length}")
        if self.pairs > self.vocabulary // 2 - 1:
            raise ValueError(f"pairs: a vocabulary of {self.vocabulary} has {self.vocabulary // 2 - 1} keys")
        if self.batch_size > self.train_examples:
            raise ValueError(f"batch_size: {self.batch_size} is more than the {self.train_examples} training examples")
        for length, _ in self.curriculum:
            if length > self.length:
                raise ValueError(f"curriculum: a lesson of {length} tokens is longer than the setting's {self.length}")
        for lesson in self.curriculum:
            self._lesson(*lesson)
        return self

    def lessons(self) -> "list[MqarOptions]":
        """The settings of the curriculum and, last, this one; all have the same number of tokens in a batch."""
        return [self._lesson(*lesson) for lesson in (*self.curriculum, (self.length, self.pairs))]

    def _lesson(self, length: int, pairs: int) -> "MqarOptions":
        size = min(self.batch_size * self.length // length, self.train_examples)
        return MqarOptions(
            **{**self.model_dump(), "length": length, "pairs": pairs, "batch_size": size, "curriculum": ()}
        )


class Examples(NamedTuple):
    """ids [N, T]; where each key is asked for again, positions [N, K], in the order of the pairs; the answers [N, K].
    All int64."""

    ids: Tensor
    positions: Tensor
    answers: Tensor

    def rows(self, index: Tensor) -> "Examples":
        """The examples of these numbers."""
        return Examples(*(part[index] for part in self))

    def batches(self, size: int) -> Iterator["Examples"]:
        """All of them in order, `size` at a time."""
        return (Examples(*parts) for parts in zip(*(part.split(size) for part in self), strict=True))


def make_examples(count: int, options: MqarOptions, seed: int, device: Any = "cpu") -> Examples:
    """`count` examples: k_1 v_1 .. k_K v_K, then key j again at position 2K + 2 g_j, where its value is the answer.

    Keys, values and the places g are drawn without replacement, keys and values uniformly, place i = 0, 1, .. with
    weight (i + 1)^(a - 1).
    """
    generator = torch.Generator(device).manual_seed(seed)
    parts = [
        _make(min(_ROWS_AT_A_TIME, count - first), options, generator) for first in range(0, count, _ROWS_AT_A_TIME)
    ]
    return Examples(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _make(count: int, options: MqarOptions, generator: torch.Generator) -> Examples:
    device, half, pairs = generator.device, options.vocabulary // 2, options.pairs
    places = (options.length - 2 * pairs) // 2

    def distinct(choices: int, weights: Tensor | None = None) -> Tensor:
        """[count, pairs] distinct numbers below `choices`: the largest of Gumbel-perturbed log weights, which come in
        the order in which drawing one by one without replacement would find them."""
        noise = -torch.log(-torch.log(torch.rand(count, choices, generator=generator, device=device)))
        return (noise if weights is None else noise + weights).topk(pairs, dim=1).indices

    keys, values = 1 + distinct(half - 1), half + distinct(half)
    order = torch.arange(1, places + 1, device=device, dtype=torch.float32)
    positions = 2 * pairs + 2 * distinct(places, (options.power - 1) * order.log())
    if options.random_filler:
        ids = torch.randint(options.vocabulary, (count, options.length), generator=generator, device=device)
    else:
        ids = torch.zeros(count, options.length, dtype=torch.int64, device=device)
    ids[:, 0 : 2 * pairs : 2] = keys
    ids[:, 1 : 2 * pairs : 2] = values
    ids.scatter_(1, positions, keys)
    return Examples(ids, positions, values)
