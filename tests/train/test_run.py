"""A run of stages on real (tiny) models: it learns, and nothing that can happen to it costs more than it must."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from t2r.convert import convert
from t2r.errors import InputError
from t2r.publish import verify_manifest
from t2r.recipe import RunFolder, dump, parse_recipe
from t2r.train import NonFiniteError, arguments, checkpoints, finetune, is_finished, objectives
from t2r.train.progress import ProgressCallback, read_log
from t2r.train.trainer import StageTrainer

from .runs import STAGES, MakeRecipe, interrupted, losses, same, weights


def test_every_stage_learns_and_leaves_what_it_says(make_recipe: MakeRecipe, text_file: Path) -> None:
    stages = [{**STAGES[name], "tokens": 2560} for name in ("align", "distill", "lora")]
    stages[2]["lr"] = 0.03
    # `paper` starts far from its teacher, so that a few steps show.
    mixer = {"name": "gsa", "style": "paper", "slots": 8, "layers": "0,2"}
    recipe = make_recipe(*stages, mixer=mixer, data={"validation": {"source": str(text_file)}})
    folder = RunFolder(recipe)
    before = folder.converted
    before.unlink()
    convert(recipe.model.source, before, mixers=recipe.mixer, dtype="float32")
    final = finetune(recipe)
    assert final == folder.model
    for stage, place in zip(recipe.stages, folder.stages, strict=True):
        log = read_log(place.log)
        training = [line for line in log if "loss" in line]
        assert [line["step"] for line in training] == list(range(1, 21))
        assert training[-1]["tokens"] == 2560
        first, last = (sum(line["loss"] for line in part) / 4 for part in (training[:4], training[-4:]))
        assert last < 0.95 * first, stage.kind
        assert [line for line in log if "validation_loss" in line]
        assert training[0].keys() >= {"loss", "lr", "grad_norm", "tokens_per_second", "seconds"}
        summary = json.loads(place.summary.read_text())
        assert (summary["kind"], summary["tokens"], summary["steps"]) == (stage.kind, 2560, 20)
        assert not verify_manifest(place.model)
        assert (place.model / "tokenizer.json").read_bytes() == (before / "tokenizer.json").read_bytes()
        assert not [path for path in place.path.rglob("*") if path.suffix in (".bin", ".pkl", ".pt", ".pth")]
    assert not verify_manifest(final)
    assert parse_recipe((final / "recipe.yaml").read_text()) == recipe
    card = (final / "README.md").read_text()
    assert card.startswith("---\n")
    assert "| 3-finetune, LoRA r 2 (merged) | 2,560 | 20 |" in card
    assert same(weights(final), weights(folder.stages[-1].model))
    assert AutoModelForCausalLM.from_pretrained(final, trust_remote_code=False).config.use_cache
    untouched = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(weights(folder.stages[0].model)[untouched], weights(before)[untouched])
    assert not torch.equal(weights(folder.stages[1].model)[untouched], weights(before)[untouched])
    assert finetune(recipe) == final  # nothing left to do


def test_stages_read_on_where_the_one_before_stopped(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(STAGES["align"], STAGES["finetune"])
    finetune(recipe)
    states = [json.loads(place.summary.read_text())["data_state"] for place in RunFolder(recipe).stages]
    assert states[0] != states[1]
    whole = make_recipe({**STAGES["align"], "tokens": 1536}, output="whole")
    finetune(whole)
    assert json.loads(RunFolder(whole).stages[0].summary.read_text())["data_state"] == states[1]


def test_a_stage_added_later_is_trained_and_the_final_student_made_anew(make_recipe: MakeRecipe) -> None:
    one, two = make_recipe(STAGES["align"]), make_recipe(STAGES["align"], STAGES["finetune"])
    finetune(one)
    before = weights(RunFolder(one).model)
    assert is_finished(one)
    assert not is_finished(two)
    finetune(two)
    assert is_finished(two)
    assert not same(weights(RunFolder(two).model), before)
    assert same(weights(RunFolder(two).model), weights(RunFolder(two).stages[1].model))
    assert not is_finished(one)  # the folder is the longer recipe's now


def test_an_adapter_does_not_switch_gradient_checkpointing_off(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe({**STAGES["lora"], "gradient_checkpointing": True})
    seen = []
    step = StageTrainer.training_step

    def training_step(self: StageTrainer, model: Any, *args: Any) -> Any:
        layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
        seen.append(bool(layers) and all(layer.gradient_checkpointing for layer in layers))
        loss = step(self, model, *args)
        adapter = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
        seen.append(all(gradient is not None and gradient.abs().sum() > 0 for gradient in adapter))
        return loss

    monkeypatch.setattr(StageTrainer, "training_step", training_step)
    finetune(recipe)
    assert seen
    assert all(seen)


def test_an_adapter_reloads_and_merges_to_the_stages_model(make_recipe: MakeRecipe) -> None:
    from peft import PeftModel

    recipe = make_recipe({**STAGES["lora"], "lr": 0.05})
    folder = RunFolder(recipe)
    finetune(recipe)
    place = folder.stages[0]
    assert not verify_manifest(place.adapter)
    names = {path.name for path in place.adapter.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    config = json.loads((place.adapter / "adapter_config.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"], trust_remote_code=False)
    merged = PeftModel.from_pretrained(base, place.adapter).merge_and_unload()
    trained = weights(place.model)
    for name, value in merged.named_parameters():
        torch.testing.assert_close(value.detach(), trained[name], rtol=0, atol=1e-6)
    changed = [name for name, value in trained.items() if not torch.equal(value, weights(folder.converted)[name])]
    assert {name.rsplit(".", 2)[-2] for name in changed} == {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_a_non_finite_value_stops_before_the_update(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    recipe = make_recipe({**STAGES["align"], "save_every": 2})
    steps: list[int] = []
    plain = objectives.Align.loss

    def loss(self: Any, student: Any, batch: Any, **prepared: Any) -> torch.Tensor:
        value = plain(self, student, batch, **prepared)
        steps.append(len(steps) + 1)
        if len(steps) < 8:  # two micro-batches a step: the eighth is in step 4
            return value
        return value * torch.nan if what == "loss" else value + (value - value.detach()).sqrt()

    updates: list[int] = []
    monkeypatch.setattr(objectives.Align, "loss", loss)
    monkeypatch.setattr(
        ProgressCallback, "on_optimizer_step", lambda self, args, state, control, **_: updates.append(1), raising=False
    )
    with pytest.raises(NonFiniteError, match=rf"align step 4: {what} is nan; stopped before the update, .*step-0*2"):
        finetune(recipe)
    assert NonFiniteError.exit_code == 1
    assert len(updates) == 3
    place = RunFolder(recipe).stages[0]
    assert checkpoints.newest_verified(place.checkpoints) == checkpoints.path_of(place.checkpoints, 2)
    assert not place.model.exists()


def test_a_folder_of_another_recipe_is_refused(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(make_recipe, monkeypatch)
    with pytest.raises(InputError, match=r"another recipe \(stages.0.lr.mixer is 0.01 there, 0.02 here\)"):
        finetune(make_recipe({**STAGES["align"], "save_every": 2, "lr": 0.02}))
    # how often it saves, and what follows, is free
    finetune(make_recipe({**STAGES["align"], "save_every": 3}, STAGES["finetune"]))


@pytest.mark.parametrize(
    ("last", "fsdp", "told"),
    [
        ({"kind": "finetune", "batch_tokens": 64}, False, "2 rows cannot be shared by 2 processes"),
        (STAGES["lora"], True, "not together with an adapter"),
    ],
)
def test_a_last_stage_that_cannot_run_is_told_before_the_first(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, last: dict[str, Any], fsdp: bool, told: str
) -> None:
    monkeypatch.setattr(arguments, "processes", lambda: SimpleNamespace(num_processes=2))
    recipe = make_recipe(STAGES["align"], last, distributed={"fsdp": fsdp})
    with pytest.raises(InputError, match=told):
        finetune(recipe)
    assert not RunFolder(recipe).stages[0].path.exists()


def test_too_little_validation_text_for_the_last_stage_is_told_before_the_first(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    (tmp_path / "validation.txt").write_text("word " * 40)
    long = {**STAGES["finetune"], "sequence_length": 512, "batch_tokens": 1024, "tokens": 1024}
    data = {"validation": {"source": str(tmp_path / "validation.txt")}}
    recipe = make_recipe(STAGES["align"], long, data=data)
    with pytest.raises(InputError, match="fewer than one window of 512"):
        finetune(recipe)
    assert not RunFolder(recipe).stages[0].path.exists()


def test_the_folder_of_a_model_is_no_folder_for_a_run(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(STAGES["align"])
    converted = RunFolder(recipe).converted
    inside = RunFolder(recipe.model_copy(update={"output": str(converted)}))
    with pytest.raises(InputError, match="output is the folder of a model"):
        inside.claim()
    assert not inside.recipe_file.exists()


def test_without_a_converted_student(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(STAGES["align"])
    RunFolder(recipe).converted.unlink()
    with pytest.raises(InputError, match="no converted student"):
        finetune(recipe)
    assert not RunFolder(recipe).recipe_file.exists()


def test_bf16_trains_fp32_weights(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    create = StageTrainer.create_optimizer

    def spy(self: Any, model: Any = None) -> Any:
        seen["parameters"] = {p.dtype for p in self.model.parameters()}
        return create(self, model)

    monkeypatch.setattr(StageTrainer, "create_optimizer", spy)
    recipe = make_recipe({**STAGES["distill"], "precision": "bf16"})
    finetune(recipe)
    assert seen["parameters"] == {torch.float32}
    history = losses(RunFolder(recipe).stages[0].log)
    assert history[-1][1] < history[0][1]


@pytest.mark.slow
def test_two_processes_train_as_one(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    alone = make_recipe(STAGES["align"], output="alone")
    finetune(alone)
    recipe = make_recipe(STAGES["align"], output="pair")
    (tmp_path / "recipe.yaml").write_text(dump(recipe))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    ended = subprocess.run(
        [*torchrun, "-m", "t2r", "finetune", str(tmp_path / "recipe.yaml")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert ended.returncode == 0, ended.stderr
    one, two = (losses(RunFolder(r).stages[0].log) for r in (alone, recipe))
    assert [step for step, _ in one] == [step for step, _ in two]
    torch.testing.assert_close([x for _, x in two], [x for _, x in one], rtol=1e-4, atol=1e-5)
