"""Training one small model on MQAR, and its accuracy."""

import math
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from t2r_evals.mqar.examples import Examples, MqarOptions, make_examples
from t2r_evals.schema import Record

_LINE_EVERY = 10.0  # seconds between two lines of progress where there is no terminal
_EAGER_STEPS = 3  # before a CUDA graph is captured: kernels are compiled and buffers made
_TEST_BATCHES = 4  # batches of training that are tested at a time


class Epoch(Record):
    """One pass over the training examples: of which setting, the accuracy on its test set after it, the seconds since
    the training began."""

    length: int
    pairs: int
    accuracy: float
    seconds: float


class MqarResult(Record):
    """One trained model. `accuracy` is over all queries of the test set of the setting itself, whatever lesson the
    curriculum had reached."""

    mixer: str
    width: int
    lr: float
    accuracy: float
    curve: list[Epoch]
    parameters: int
    seconds: float


def train(
    model: Any,
    options: MqarOptions,
    lr: float,
    *,
    mixer: str = "",
    width: int = 0,
    device: Any = "cpu",
    stop: Callable[[], bool] = lambda: False,
) -> MqarResult:
    """Train a model with AdamW, a linear warm-up and a cosine to zero, and test it.

    Every step has the same number of tokens: a lesson shorter than the setting has more examples in a batch.

    Args:
        model: from ids [B, T] to an output with .logits [B, T, V].
        stop: asked after each epoch; True ends the training where it is.
    """
    model.to(device).train()
    step = _Step(model, options, device)
    order = torch.Generator(device).manual_seed(options.seed)
    lesson, *lessons = options.lessons()
    train_set, test_set = _sets(lesson, device)
    curve: list[Epoch] = []
    steps = patience = 0
    start = said = time.perf_counter()
    name = f"{mixer} width {width} lr {lr:.1e}"
    progress = tqdm(range(options.epochs), desc=name, leave=False, disable=None)
    for epoch in progress:
        model.train()
        permutation = torch.randperm(len(train_set.ids), generator=order, device=device)
        batches = permutation[: len(permutation) // lesson.batch_size * lesson.batch_size].split(lesson.batch_size)
        for index, rows in enumerate(batches):
            steps += 1
            done = max((epoch + index / len(batches)) / options.epochs, _share_of_time(start, options))
            if done >= 1:
                break
            rise = min(1.0, steps / max(options.warmup, 1))
            step(train_set.rows(rows), lr * rise * (1 + math.cos(math.pi * done)) / 2)
        right = accuracy(model, test_set, _TEST_BATCHES * lesson.batch_size, device)
        now = time.perf_counter()
        curve.append(Epoch(length=lesson.length, pairs=lesson.pairs, accuracy=right, seconds=now - start))
        progress.set_postfix(pairs=lesson.pairs, accuracy=f"{right:.3f}")
        ended = (not lessons and right >= options.enough) or _share_of_time(start, options) >= 1 or stop()
        if progress.disable and (now - said > _LINE_EVERY or ended or epoch + 1 == options.epochs):
            where = f"epoch {epoch + 1} ({lesson.length} tokens, {lesson.pairs} pairs)"
            print(f"{name}: {where}, accuracy {right:.4f}, {now - start:.0f} s", file=sys.stderr, flush=True)
            said = now
        if ended:
            break
        patience += 1
        if lessons and (right >= options.learned or patience == options.patience):
            lesson, patience = lessons.pop(0), 0
            train_set, test_set = _sets(lesson, device)
    progress.close()
    if lessons:
        right = accuracy(model, _sets(options, device)[1], _TEST_BATCHES * options.batch_size, device)
    return MqarResult(
        mixer=mixer,
        width=width,
        lr=lr,
        accuracy=right,
        curve=curve,
        parameters=sum(p.numel() for p in model.parameters()),
        seconds=time.perf_counter() - start,
    )


def _sets(options: MqarOptions, device: Any) -> tuple[Examples, Examples]:
    """The examples to train on and those to test on."""
    return (
        make_examples(options.train_examples, options, options.seed, device),
        make_examples(options.test_examples, options, options.seed + 1, device),
    )


@torch.inference_mode()
def accuracy(model: Any, examples: Examples, batch_size: int, device: Any = "cpu") -> float:
    """Share of queries whose value is the likeliest token."""
    model.eval()
    right = torch.zeros((), device=device, dtype=torch.int64)
    for batch in examples.batches(batch_size):
        with _autocast(device):
            right += (_logits(model, batch).argmax(-1) == batch.answers).sum()
    return int(right) / examples.answers.numel()


class _Step:
    """One optimiser step on a batch. On a GPU it is captured as a CUDA graph, one per shape of a batch, and replayed:
    these models' hundreds of small kernels run faster than they can be launched one by one."""

    def __init__(self, model: Any, options: MqarOptions, device: Any) -> None:
        self.model, self.device = model, device
        # A tensor, so that a captured step reads the rate of the moment.
        self.lr = torch.zeros((), device=device)
        self.on_gpu = torch.device(device).type == "cuda"
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=self.lr, weight_decay=options.weight_decay, fused=True, capturable=self.on_gpu
        )
        # The lessons of a curriculum, each of another shape, are over before their compilation would pay.
        self.compiled = torch.compile(_logits, dynamic=False) if options.compile else _logits
        self.compiled_for = options.batch_size, options.length
        self.eager_steps: Counter[torch.Size] = Counter()
        self.graphs: dict[torch.Size, tuple[torch.cuda.CUDAGraph, Examples]] = {}
        # One pool for all graphs: no two of them run at a time, and nothing in it outlives a step.
        self.pool = torch.cuda.graph_pool_handle() if self.on_gpu else None

    def __call__(self, batch: Examples, lr: float) -> None:
        self.lr.fill_(lr)
        shape = batch.ids.shape + batch.positions.shape
        if not self.on_gpu:
            self._run(batch)
        elif self.eager_steps[shape] < _EAGER_STEPS:
            # Capturing wants the steps before it on a stream of their own.
            self.eager_steps[shape] += 1
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._run(batch)
            torch.cuda.current_stream().wait_stream(side)
        else:
            if shape not in self.graphs:
                self.graphs[shape] = torch.cuda.CUDAGraph(), Examples(*(part.clone() for part in batch))
                graph, held = self.graphs[shape]
                with torch.cuda.graph(graph, pool=self.pool):
                    self._run(held)
            graph, held = self.graphs[shape]
            for old, new in zip(held, batch, strict=True):
                old.copy_(new)
            graph.replay()

    def _run(self, batch: Examples) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        compute = self.compiled if batch.ids.shape == self.compiled_for else _logits
        with _autocast(self.device):
            logits = compute(self.model, batch)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch.answers.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


def _logits(model: Any, batch: Examples) -> Tensor:
    """[B, K, V] where keys are asked for; through the body and the head apart where the model has them, for the logits
    of all positions would be most of the memory."""
    if hasattr(model, "model") and hasattr(model, "lm_head"):
        hidden = model.model(input_ids=batch.ids, use_cache=False).last_hidden_state
        return model.lm_head(_at(hidden, batch.positions))
    return _at(model(batch.ids).logits, batch.positions)


def _at(x: Tensor, positions: Tensor) -> Tensor:
    return x.gather(1, positions[:, :, None].expand(-1, -1, x.shape[-1]))


def _share_of_time(start: float, options: MqarOptions) -> float:
    return 0.0 if options.minutes is None else (time.perf_counter() - start) / (60 * options.minutes)


def _autocast(device: Any) -> Any:
    # Without the cache of converted weights: a captured step would go on reading the weights of its capture.
    on_gpu = torch.device(device).type == "cuda"
    return torch.autocast("cuda", torch.bfloat16, cache_enabled=False) if on_gpu else nullcontext()
