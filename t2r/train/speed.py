"""Tokens per second, MFU and memory of a stage on this machine, from a configuration alone.

Teacher and student are drawn at random on the device itself, so a 7B model stands in seconds and needs no host memory;
the arithmetic does not depend on what the weights say. They are trained by the trainer, objectives and losses that
`t2r finetune` runs.
"""

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, TrainerCallback

from t2r.model import assign_mixers, student_config
from t2r.recipe import FinetuneStage, Recipe
from t2r.train.arguments import processes, training_arguments
from t2r.train.flops import training_flops
from t2r.train.fused import fuse
from t2r.train.objectives import make_objective
from t2r.train.packing import IGNORE, Row, collate
from t2r.train.parameters import make_trainable
from t2r.train.signals import StopSignal
from t2r.train.trainer import StageTrainer


def measure_stage(
    host: PreTrainedConfig, recipe: Recipe, *, warmup: int, document: int, profile: Path | None = None
) -> dict[str, Any]:
    """Train by the only stage of `recipe` and tell how it went. Under torchrun every process calls this.

    Args:
        host: the teacher's configuration.
        recipe: its mixer, its stage (whose steps are the warm-up and the timed ones) and how processes share the model.
        warmup: steps before the clock starts; kernels are compiled in the first.
        document: tokens of each of the documents that rows are packed from.
        profile: where to write the operations of one more step by their time on the device.

    Returns:
        JSON's types: seconds per step, tokens per second over all processes, FLOPs per token, peak bytes of a device,
        and the losses.

    Raises:
        torch.OutOfMemoryError: it does not fit; nothing is left on the device once the exception is dropped.
    """
    (stage,) = recipe.stages
    state = processes()
    device = state.device
    teacher = None
    if not isinstance(stage, FinetuneStage):
        teacher = random_model(host, getattr(torch, recipe.model.dtype), device).eval().requires_grad_(False)
        if stage.fused:
            fuse(teacher, device)
    mixers = assign_mixers(recipe.mixer, host.num_hidden_layers)
    student = random_model(student_config(host, mixers), torch.float32, device)
    objective = make_objective(stage, teacher)
    model = make_trainable(student, stage, "random", device)
    flops = training_flops(model, teacher, stage, min(document, stage.sequence_length))
    counted = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # a frozen matrix was drawn in float32
    clock = _Clock(device, warmup, stage.steps - (profile is not None), profile)
    with tempfile.TemporaryDirectory() as folder, objective.installed(student):
        trainer = StageTrainer(
            model,
            training_arguments(recipe, stage, Path(folder)),
            stage=stage,
            objective=objective,
            loader=_RandomRows(stage, host.vocab_size, document, seed=state.process_index),  # type: ignore[arg-type]
            validation=[],
            stop=StopSignal(),
            distributed=recipe.distributed,
            callbacks=[clock],
        )
        trainer.train()
    seconds = statistics.median(clock.seconds)
    return {
        **counted,
        "seconds_per_step": seconds,
        "tokens_per_second": stage.batch_tokens / seconds,
        "flops_per_token": flops,
        "flops_per_second_and_device": stage.batch_tokens / seconds * flops["total"] / state.num_processes,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
    }


def matrix_rate(device: torch.device, size: int) -> float:
    """FLOP/s of a bfloat16 product of two random size x size matrices: the median of 20 after 5."""
    x, y = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(25):
        _wait(device)
        start = time.perf_counter()
        x @ y
        _wait(device)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times[5:])


def random_model(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> Any:
    """A model with random weights, made where it will run."""
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _RandomRows:
    """Stands for the loader: endless micro-batches of random tokens."""

    state = None

    def __init__(self, stage: Any, vocabulary: int, document: int, *, seed: int) -> None:
        self._stage, self._vocabulary, self._document = stage, vocabulary, document
        self._random = np.random.default_rng(seed)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        length = self._stage.sequence_length
        position = np.arange(length) % self._document
        while True:
            rows = []
            for _ in range(self._stage.micro_batch_size):
                ids = self._random.integers(self._vocabulary, size=length + 1)
                labels = np.where(np.append(position[1:], 1) == 0, IGNORE, ids[1:])
                rows.append(Row(ids[:-1], labels, position))
            yield collate(rows)


class _Clock(TrainerCallback):
    """Seconds of each step after the warm-up, the device having finished; then, where asked for, one step's profile."""

    def __init__(self, device: torch.device, warmup: int, last: int, profile: Path | None) -> None:
        self._device, self._warmup, self._last, self._path = device, warmup, last, profile
        self._profiler: Any = None
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._last:
            self._profiler = torch.profiler.profile()
            self._profiler.start()
        _wait(self._device)
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _wait(self._device)
        if self._profiler is not None:
            self._profiler.stop()
            kind = "cuda" if self._device.type == "cuda" else "cpu"
            table = self._profiler.key_averages().table(
                sort_by=f"self_{kind}_time_total", row_limit=60, max_name_column_width=90
            )
            assert self._path is not None
            self._path.write_text(table)
        elif state.global_step > self._warmup:
            self.seconds.append(time.perf_counter() - self._start)
