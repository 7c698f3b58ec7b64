"""A run that is interrupted, killed or damaged goes on, and ends as the one that was not."""

import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from t2r.errors import InputError
from t2r.recipe import RunFolder, dump
from t2r.train import checkpoints, finetune

from .runs import STAGES, MakeRecipe, interrupted, losses, same, signal_at, weights


@pytest.mark.parametrize("name", STAGES)
def test_a_resumed_run_equals_the_uninterrupted_one(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    whole, broken = (make_recipe(STAGES[name], output=output) for output in ("whole", "broken"))
    finetune(whole)
    with monkeypatch.context() as patch:
        signal_at(patch, 3)
        with pytest.raises(SystemExit) as stopped:
            finetune(broken)
    assert stopped.value.code == 128 + signal.SIGTERM
    place = RunFolder(broken).stages[0]
    assert [path.name for path in checkpoints.list_checkpoints(place.checkpoints)] == ["step-00000003"]
    assert not place.model.exists()
    finetune(broken)
    assert same(weights(RunFolder(broken).model), weights(RunFolder(whole).model))
    assert losses(place.log) == losses(RunFolder(whole).stages[0].log)


def test_ctrl_c_saves_and_ends_as_ctrl_c(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(STAGES["align"])
    signal_at(monkeypatch, 2, signal.SIGINT)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        finetune(recipe)
    assert signal.getsignal(signal.SIGINT) is before
    assert checkpoints.newest_verified(RunFolder(recipe).stages[0].checkpoints)


def test_rotation_keeps_the_newest_by_step(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe({**STAGES["align"], "save_every": 1, "save_total_limit": 2})
    finetune(recipe)
    kept = checkpoints.list_checkpoints(RunFolder(recipe).stages[0].checkpoints)
    assert [checkpoints.step_of(path) for path in kept] == [4, 5]


def test_rotation_never_removes_the_one_that_verifies(tmp_path: Path) -> None:
    for step in (8, 9, 10):
        checkpoints.path_of(tmp_path, step).mkdir()  # broken ones, of later steps
    good = checkpoints.path_of(tmp_path, 5)
    good.mkdir()
    checkpoints.rotate(tmp_path, 1, good)
    assert [checkpoints.step_of(path) for path in checkpoints.list_checkpoints(tmp_path)] == [5, 10]


WEIGHTS = "weights/shard-00001-model-00001-of-00001.safetensors"


@pytest.mark.parametrize("damage", ["truncate", WEIGHTS, "rng_state.pth", "scheduler.pt", "manifest.json"])
def test_resume_steps_back_over_a_broken_checkpoint_and_says_so(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    recipe = interrupted(make_recipe, monkeypatch)
    place = RunFolder(recipe).stages[0]
    newest = checkpoints.path_of(place.checkpoints, 4)
    if damage == "truncate":
        file = newest / WEIGHTS
        file.write_bytes(file.read_bytes()[:-1] + b"\0")
    else:
        (newest / damage).unlink()
    assert checkpoints.newest_verified(place.checkpoints) == checkpoints.path_of(place.checkpoints, 2)
    assert "step-00000004 does not verify" in caplog.text
    if damage == "truncate":
        finetune(recipe)
        assert [step for step, _ in losses(place.log)] == [1, 2, 3, 4, 5, 6]


def test_a_checkpoint_without_its_weights_does_not_verify_even_with_a_fitting_manifest(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = RunFolder(interrupted(make_recipe, monkeypatch)).stages[0]
    newest = checkpoints.path_of(place.checkpoints, 4)
    manifest = json.loads((newest / "manifest.json").read_text())
    del manifest["files"][WEIGHTS]
    (newest / "manifest.json").write_text(json.dumps(manifest))
    (newest / WEIGHTS).unlink()
    assert checkpoints.problems(newest) == [f"{newest}: no weights and optimizer state (weights)"]


def test_resume_from_a_path_and_never(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make_recipe({**STAGES["align"], "save_every": 2}, output="whole")
    finetune(whole)
    recipe = interrupted(make_recipe, monkeypatch)
    place = RunFolder(recipe).stages[0]
    with pytest.raises(InputError, match="not a checkpoint of this run"):
        finetune(recipe, resume=Path("elsewhere/step-00000002"))
    finetune(recipe, resume=checkpoints.path_of(place.checkpoints, 2))
    assert same(weights(RunFolder(recipe).model), weights(RunFolder(whole).model))
    finetune(recipe, resume="never")
    assert same(weights(RunFolder(recipe).model), weights(RunFolder(whole).model))


def test_a_kill_during_a_save_leaves_the_checkpoint_before(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe({**STAGES["align"], "save_every": 2})
    (tmp_path / "recipe.yaml").write_text(dump(recipe))
    script = textwrap.dedent(
        """
        import os, sys
        from t2r.recipe import load_recipe
        from t2r.train import finetune
        from t2r.train.trainer import StageTrainer

        save = StageTrainer._save_rng_state
        def killed(self, folder):
            save(self, folder)
            if self.state.global_step == 4:
                os._exit(9)
        StageTrainer._save_rng_state = killed
        finetune(load_recipe(sys.argv[1]))
        """
    )
    ended = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "recipe.yaml")], capture_output=True, text=True
    )
    assert ended.returncode == 9, ended.stderr
    place = RunFolder(recipe).stages[0]
    assert list(place.checkpoints.glob(".step-00000004.partial-*"))
    assert checkpoints.newest_verified(place.checkpoints) == checkpoints.path_of(place.checkpoints, 2)
    finetune(recipe)
    assert not list(place.checkpoints.glob(".*"))
    whole = make_recipe({**STAGES["align"], "save_every": 2}, output="whole")
    finetune(whole)
    assert same(weights(RunFolder(recipe).model), weights(RunFolder(whole).model))
