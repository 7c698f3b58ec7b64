"""FSDP2 over two CPU processes: the loss curve of one, checkpoints that any number of processes goes on from."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from t2r.recipe import Recipe, RunFolder, dump
from t2r.train import checkpoints, finetune
from t2r.train.progress import read_log

STAGES = [
    {"kind": "align", "tokens": 384},
    {"kind": "distill", "teacher_top_k": 16, "ce_weight": 0.1, "gradient_checkpointing": True, "save_every": 2},
]


def two_processes(recipe: Recipe, folder: Path, *options: str) -> str:
    file = folder / "recipe.yaml"
    file.write_text(dump(recipe))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    ended = subprocess.run(
        [*torchrun, str(Path(__file__).with_name("fsdp_on_cpu.py")), "finetune", str(file), *options],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def curve(recipe: Recipe, stage: int) -> list[float]:
    lines = [line for line in read_log(RunFolder(recipe).stages[stage].log) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sharded_training_is_training_and_resumes_on_any_number_of_processes(
    make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    distributed = {"fsdp": True}  # one process takes no notice
    one, two = (make_recipe(*STAGES, output=name, distributed=distributed) for name in ("one", "two"))
    finetune(one)
    assert "parameters: {'DTensor'}" in two_processes(two, tmp_path)
    expected = [curve(one, stage) for stage in (0, 1)]
    for stage in (0, 1):
        torch.testing.assert_close(curve(two, stage), expected[stage], rtol=1e-4, atol=1e-6)
    a, b = (load_file(RunFolder(r).model / "model.safetensors") for r in (one, two))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-3, atol=1e-4)

    places = [RunFolder(r).stages[1].checkpoints for r in (one, two)]
    early = [checkpoints.path_of(place, 4) for place in places]
    shards = [len(list((path / checkpoints.WEIGHTS).iterdir())) for path in early]
    assert shards == [1, 2]
    two_processes(one, tmp_path, "--resume", str(early[0]))
    finetune(two, resume=early[1])
    for recipe in (one, two):
        torch.testing.assert_close(curve(recipe, 1), expected[1], rtol=1e-4, atol=1e-6)
        assert json.loads(RunFolder(recipe).stages[1].summary.read_text())["steps"] == 6
