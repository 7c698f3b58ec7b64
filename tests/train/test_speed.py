"""`t2r bench train`: its FLOPs against torch's own count, and rows that are what they say."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from click import UsageError
from click.testing import CliRunner
from torch.utils.flop_counter import FlopCounterMode
from transformers import MistralConfig

from t2r.cli.bench import command
from t2r.errors import InputError
from t2r.recipe import Recipe, parse_recipe
from t2r.train import speed
from t2r.train.flops import training_flops
from t2r.train.trainer import StageTrainer

HOST = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "sliding_window": None,
}


def recipe(**stage: Any) -> Recipe:
    base = {"tokens": 256, "sequence_length": 64, "batch_tokens": 128, "micro_batch_size": 2, "lr": 1e-4}
    content = {
        "model": {"source": "random", "dtype": "float32"},
        "mixer": {"name": "gsa", "slots": 8, "sinks": 2},
        "data": {"source": "random"},
        "stages": [{**base, "precision": "fp32", "log_every": 1, **stage}],
        "output": "random",
    }
    return parse_recipe(json.dumps(content))


@pytest.mark.parametrize(
    "stage",
    [
        {"kind": "finetune"},
        {"kind": "finetune", "gradient_checkpointing": True},
        {"kind": "distill", "ce_weight": 0.1},
        {"kind": "align"},
    ],
    ids=["finetune", "checkpointed", "distill", "align"],
)
def test_products_of_matrices_are_those_that_run(monkeypatch: pytest.MonkeyPatch, stage: dict[str, Any]) -> None:
    """torch counts what is multiplied; mixing aside (batched products) the formula is exact."""
    counted: dict[str, float] = {}

    def training_step(self: StageTrainer, model: Any, inputs: Any, items: Any = None) -> Any:
        teacher = getattr(self.objective, "teacher", None)
        formula = training_flops(model, teacher, self.stage, 64)
        mixing = training_flops(model, teacher, self.stage, 0)
        with FlopCounterMode(display=False) as counter:
            loss = step(self, model, inputs, items)
        counted["run"] = counter.get_flop_counts()["Global"][torch.ops.aten.mm] / 128
        states = 2 * 2 * 2 * 8 * 8 * (1 + 2) * 2  # layers, 2 S (1 + HQ / H), S = 2 H M D
        counted["formula"] = mixing["total"] - 3 * states
        assert formula["teacher"] - mixing["teacher"] == (0 if teacher is None else 2 * 2 * 4 * 8 * 64)
        return loss

    step = StageTrainer.training_step
    monkeypatch.setattr(StageTrainer, "training_step", training_step)
    result = speed.measure_stage(MistralConfig(**HOST), recipe(**stage), warmup=1, document=64)
    assert result["losses"]
    recomputed = 0.0
    if stage.get("gradient_checkpointing"):
        # q and o, k and v, gates, MLP but its last product, whose result no gradient needs
        per_layer = 2 * 32 * 32 + 2 * 32 * 16 + 32 * 16 + 2 * 32 * 48
        recomputed = 2.0 * 2 * per_layer
    assert counted["run"] == counted["formula"] + recomputed


def test_every_row_is_measured_and_written(tmp_path: Path) -> None:
    MistralConfig(**HOST).save_pretrained(tmp_path)
    options = ["--config", str(tmp_path), "--lengths", "32", "--micro-tokens", "64", "--top-k", "8"]
    options += ["--mixer", "gsa:slots=8,sinks=2", "--steps", "1", "--warmup", "1", "--output", str(tmp_path / "x.json")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ended = CliRunner().invoke(command, ["train", *options], catch_exceptions=False)
    assert ended.exit_code == 0
    record = json.loads((tmp_path / "x.json").read_text())
    rows = {(row["stage"], row["train"]): row for row in record["rows"]}
    kinds = [("finetune", "full"), ("finetune", "lora"), ("distill", "full"), ("distill", "lora"), ("align", "full")]
    assert list(rows) == kinds
    for row in rows.values():
        assert row["micro_batch_size"] == 2
        assert row["tokens_per_second"] == pytest.approx(128 / row["seconds_per_step"])
        achieved = row["tokens_per_second"] * row["flops_per_token"]["total"]
        assert row["mfu"] == pytest.approx(achieved / record["matrix_flops_per_second"])
    assert rows["finetune", "lora"]["trained_parameters"] < rows["finetune", "full"]["trained_parameters"]
    assert rows["finetune", "full"]["gradient_checkpointing"]
    assert not rows["finetune", "lora"]["gradient_checkpointing"]


def test_a_row_that_does_not_fit_says_so_and_the_next_is_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    MistralConfig(**HOST).save_pretrained(tmp_path)
    measure = speed.measure_stage

    def limited(host: Any, recipe: Recipe, **options: Any) -> dict[str, Any]:
        if recipe.stages[0].micro_batch_size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. And a long story.")
        return measure(host, recipe, **options)

    monkeypatch.setattr(speed, "measure_stage", limited)
    options = ["--config", str(tmp_path), "--lengths", "32", "--micro-tokens", "128", "--stages", "finetune"]
    options += ["--train", "full", "--steps", "1", "--warmup", "1"]
    ended = CliRunner().invoke(command, ["train", *options], catch_exceptions=False)
    lines = [line for line in ended.output.splitlines() if line.startswith("finetune")]
    assert [line.split()[3] for line in lines] == ["4", "2", "1"]
    assert [line.split("does not fit: ")[1:] for line in lines[:2]] == [["CUDA out of memory"]] * 2
    assert "does not fit" not in lines[2]


def test_decoding_is_timed_for_student_and_teacher(tmp_path: Path) -> None:
    MistralConfig(**HOST).save_pretrained(tmp_path)
    options = ["--config", str(tmp_path), "--mixer", "gsa:slots=8,sinks=2", "--contexts", "16,64", "--tokens", "3"]
    options += ["--repeats", "1", "--dtype", "float32", "--output", str(tmp_path / "decode.json")]
    ended = CliRunner().invoke(command, ["decode", *options], catch_exceptions=False)
    assert ended.exit_code == 0
    rows = json.loads((tmp_path / "decode.json").read_text())["rows"]
    assert [(row["model"], row["context"], row["batch"]) for row in rows] == [
        (model, context, 1) for model in ("teacher", "student") for context in (16, 64)
    ]
    assert all(row["decode_tokens_per_second"] > 0 and row["step_seconds"] > 0 for row in rows)
    teacher, student = ([row["state_bytes"] for row in rows if row["model"] == name] for name in ("teacher", "student"))
    assert teacher == [2 * 2 * 2 * 8 * 4 * context for context in (16, 64)]  # layers, K and V, heads, dim, float32
    assert student[0] == student[1] == 2 * 2 * 2 * 8 * 8 * 4  # the same with 8 slots


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--config", "nowhere"], "--config nowhere: neither mistral-7b nor a folder with a config.json"),
        (["--mixer", "gsa:slots"], "'slots' is no key=value"),
    ],
)
def test_wrong_options_are_one_line(options: list[str], told: str) -> None:
    with pytest.raises(InputError, match=told):
        CliRunner().invoke(command, ["decode", "--layers", "1", *options], catch_exceptions=False)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--stages", "algin"], "'algin' is none of finetune, distill, align"),
        (["--lengths", "2K,x"], "'x' is no length"),
        ([], "mistral-7b needs a GPU"),
    ],
)
def test_what_cannot_be_timed_is_told_first(arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises((UsageError, InputError), match=says):
        command.main(["train", *arguments], standalone_mode=False)
