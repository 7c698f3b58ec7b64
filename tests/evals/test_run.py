"""What `t2r run` measures: every control, a hybrid's components, speed; in process and in small."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from t2r.cli import cli
from t2r.cli.controls import teacher_finetuned
from t2r.recipe import RunFolder, load_recipe

STAGE = {"tokens": 512, "batch_tokens": 256, "micro_batch_size": 2, "precision": "fp32", "log_every": 1}


def tiny_recipe(folder: Path) -> Path:
    """A hybrid of the shipped teacher: two small stages, one control, speed at two lengths."""
    recipe = {
        "model": {"source": "shipped:demo/teacher", "dtype": "float32"},
        "mixer": {"name": "gsa", "slots": 32, "layers": "all except 2"},
        "data": {
            "source": "shipped:demo/data/train.parquet",
            "sequence_length": 128,
            "validation": {"source": "shipped:demo/data/validation.parquet"},
        },
        "stages": [
            {**STAGE, "kind": "align", "lr": 1e-3},
            {**STAGE, "kind": "distill", "lr": {"mixer": 1e-3, "rest": 3e-4}, "weight_decay": 0.02},
        ],
        "evaluate": {"controls": ["teacher-finetuned"], "windows": 2, "window": 128, "speed_contexts": [16, 48]},
        "output": str(folder / "run"),
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    return path


def test_the_teachers_own_training_has_the_same_budget_and_the_rate_of_what_both_have(tmp_path: Path) -> None:
    recipe = load_recipe(str(tiny_recipe(tmp_path)), [])
    control = teacher_finetuned(recipe, RunFolder(recipe))
    (stage,) = control.stages
    assert (stage.kind, stage.tokens, stage.lr.rest, stage.weight_decay) == ("finetune", 1024, 3e-4, 0.02)
    assert (control.data, control.seed, control.model) == (recipe.data, recipe.seed, recipe.model)
    align = load_recipe(str(tiny_recipe(tmp_path)), ["stages.1.kind=align", "stages.1.lr=1e-3"])
    assert teacher_finetuned(align, RunFolder(align)).stages[0].lr.rest == 1e-5


@pytest.mark.slow
def test_a_hybrid_run_has_the_finetuned_teacher_components_and_speed(tmp_path: Path) -> None:
    recipe = str(tiny_recipe(tmp_path))

    def run() -> Any:
        result = CliRunner().invoke(cli, ["run", recipe], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result, json.loads((tmp_path / "run" / "report.json").read_text())

    _, report = run()
    results = {result["name"]: result for result in report["results"]}
    assert {name: result["role"] for name, result in results.items()} == {
        "teacher": "teacher",
        "student": "student",
        "teacher finetuned": "control",
    }
    gsa, softmax = results["student"]["components"]
    assert ("gsa" in gsa["component"], gsa["modules"]) == (True, 5)
    assert ("softmax" in softmax["component"], softmax["modules"]) == (True, 1)
    assert [p["context"] for r in results.values() for p in r["speed"]] == [16, 48] * 3
    assert "than teacher finetuned" in (tmp_path / "run" / "report.md").read_text()

    weights = tmp_path / "run" / "controls" / "teacher-finetuned" / "model"
    config = json.loads((weights / "config.json").read_text())
    assert set(config["mixers"]) == {None}
    assert 0 < abs(results["teacher finetuned"]["language"]["loss"] - results["teacher"]["language"]["loss"]) < 0.5
    written = (weights / "model.safetensors").stat().st_mtime_ns
    again, _ = run()
    assert (weights / "model.safetensors").stat().st_mtime_ns == written
    assert again.output.count("kept") == 7  # two conversions, two trainings, three measurements
