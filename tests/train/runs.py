"""Runs of stages on tiny models, and how their outcomes are read: what the tests of this room share."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from t2r.recipe import Recipe
from t2r.train import finetune
from t2r.train.progress import ProgressCallback, read_log

MakeRecipe = Callable[..., Recipe]
STAGES: dict[str, dict[str, Any]] = {
    "align": {"kind": "align"},
    "distill": {"kind": "distill", "teacher_top_k": 16, "ce_weight": 0.1, "gradient_checkpointing": True},
    "finetune": {"kind": "finetune", "train": "all"},
    "lora": {"kind": "finetune", "adapter": {"kind": "lora", "r": 2, "dropout": 0.2}},
}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_log(folder) if "loss" in line]


def signal_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM) -> None:
    """Send this process a signal while it is in a step."""

    def on_step_begin(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step - 1:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(ProgressCallback, "on_step_begin", on_step_begin)


def interrupted(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, output: str = "run") -> Recipe:
    """A run stopped after step 4, with checkpoints of steps 2 and 4."""
    recipe = make_recipe({**STAGES["align"], "save_every": 2}, output=output)
    with monkeypatch.context() as patch:
        signal_at(patch, 4)
        with pytest.raises(SystemExit):
            finetune(recipe)
    return recipe
