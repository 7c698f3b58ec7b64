"""Training one small model on MQAR, and its accuracy."""

import math
import sys
import time
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


class MqarResult(Record):
    """One trained model. `accuracy` is over all queries of the test set, `curve` after each epoch."""

    mixer: str
    width: int
    lr: float
    accuracy: float
    curve: list[float]
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

    Args:
        model: from ids [B, T] to an output with .logits [B, T, V].
        stop: asked after each epoch; True ends the training where it is.
    """
    model.to(device).train()
    train_set = make_examples(options.train_examples, options, options.seed, device)
    test_set = make_examples(options.test_examples, options, options.seed + 1, device)
    step = _Step(model, options, device)
    epoch_steps = options.train_examples // options.batch_size
    order = torch.Generator(device).manual_seed(options.seed)
    curve: list[float] = []
    start = said = time.perf_counter()
    name = f"{mixer} width {width} lr {lr:.1e}"
    progress = tqdm(range(options.epochs), desc=name, leave=False, disable=None)
    for epoch in progress:
        model.train()
        permutation = torch.randperm(options.train_examples, generator=order, device=device)
        for index in range(epoch_steps):
            done = max((epoch + index / epoch_steps) / options.epochs, _share_of_time(start, options))
            rows = permutation[index * options.batch_size : (index + 1) * options.batch_size]
            rise = min(1.0, (1 + epoch * epoch_steps + index) / max(options.warmup, 1))
            step(train_set.rows(rows), lr * rise * (1 + math.cos(math.pi * min(done, 1.0))) / 2)
        curve.append(accuracy(model, test_set, options.batch_size, device))
        progress.set_postfix(accuracy=f"{curve[-1]:.3f}")
        now = time.perf_counter()
        ended = curve[-1] >= options.enough or _share_of_time(start, options) >= 1 or stop()
        if progress.disable and (now - said > _LINE_EVERY or ended or epoch + 1 == options.epochs):
            print(
                f"{name}: epoch {epoch + 1}, accuracy {curve[-1]:.4f}, {now - start:.0f} s", file=sys.stderr, flush=True
            )
            said = now
        if ended:
            break
    progress.close()
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
def accuracy(model: Any, examples: Examples, batch_size: int, device: Any = "cpu") -> float:
    """Share of queries whose value is the likeliest token."""
    model.eval()
    right = torch.zeros((), device=device, dtype=torch.int64)
    for batch in examples.batches(batch_size):
        with _autocast(device):
            right += (_logits(model, batch).argmax(-1) == batch.answers).sum()
    return int(right) / examples.answers.numel()


class _Step:
    """One optimiser step on a batch. On a GPU it is captured as a CUDA graph and replayed: these models' hundreds of
    small kernels run faster than they can be launched one by one."""

    def __init__(self, model: Any, options: MqarOptions, device: Any) -> None:
        self.model, self.device = model, device
        # A tensor, so that a captured step reads the rate of the moment.
        self.lr = torch.zeros((), device=device)
        on_gpu = torch.device(device).type == "cuda"
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=self.lr, weight_decay=options.weight_decay, fused=True, capturable=on_gpu
        )
        self.logits = torch.compile(_logits, dynamic=False) if options.compile else _logits
        self.graph: Any = None
        self.batch: Examples | None = None
        self.eager_steps = _EAGER_STEPS if on_gpu else None

    def __call__(self, batch: Examples, lr: float) -> None:
        self.lr.fill_(lr)
        if self.eager_steps is None:
            self._run(batch)
        elif self.eager_steps:
            # Capturing wants the steps before it on a stream of their own.
            self.eager_steps -= 1
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._run(batch)
            torch.cuda.current_stream().wait_stream(side)
        else:
            if self.graph is None:
                self.batch = Examples(*(part.clone() for part in batch))
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph):
                    self._run(self.batch)
            assert self.batch is not None
            for held, part in zip(self.batch, batch, strict=True):
                held.copy_(part)
            self.graph.replay()

    def _run(self, batch: Examples) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with _autocast(self.device):
            logits = self.logits(self.model, batch)
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
