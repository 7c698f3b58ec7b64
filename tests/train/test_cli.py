"""The verbs finetune and recipes, as a user types them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from t2r.cli import cli
from t2r.recipe import Recipe, RunFolder, dump, parse_recipe
from t2r.train import checkpoints

MakeRecipe = Callable[..., Recipe]


def run(*arguments: str) -> str:
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def t2r(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "t2r", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_ls_names_every_shipped_recipe_with_its_purpose() -> None:
    lines = dict(line.split(maxsplit=1) for line in run("recipes", "ls").splitlines())
    assert lines["gsa-mistral-7b"].startswith("Mistral-7B to GSA")
    assert all(not text.startswith(("t2r", "torchrun")) for text in lines.values())


def test_cat_and_cp(tmp_path: Path) -> None:
    text = run("recipes", "cat", "demo")
    assert parse_recipe(text).output == "runs/demo"
    run("recipes", "cp", "demo", str(tmp_path))
    run("recipes", "cp", "demo.yaml", str(tmp_path / "mine.yaml"))
    assert (tmp_path / "demo.yaml").read_text() == (tmp_path / "mine.yaml").read_text() == text
    assert "valid" in run("recipes", "validate", str(tmp_path / "mine.yaml"), "stages.0.lr=1e-4")


def test_schema_is_json_schema() -> None:
    assert json.loads(run("recipes", "validate", "--schema"))["title"] == "Recipe"


def test_listing_recipes_imports_nothing_heavy() -> None:
    code = "import sys; sys.argv = ['t2r', 'recipes', 'ls']\nfrom t2r.cli import main\n"
    code += "try:\n    main()\nfinally:\n    heavy = {'torch', 'transformers', 'pydantic'} & set(sys.modules)\n"
    code += "    print(*sorted(heavy), file=sys.stderr)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.stderr.strip() == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipes", "cat", "demoo"], "Error: demoo: no recipe of that name ships with t2r; did you mean 'demo'?"),
        (["recipes", "cp", "demo", "BROKEN"], "Error: BROKEN: already exists"),
        (["finetune", "BROKEN"], "unknown key; did you mean 'output'?"),
    ],
)
def test_bad_usage_is_told_without_a_traceback(tmp_path: Path, arguments: list[str], message: str) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("outptu: x\n")
    ended = t2r(*(str(broken) if text == "BROKEN" else text for text in arguments))
    assert ended.returncode == 2
    assert message.replace("BROKEN", str(broken)) in ended.stderr
    assert "Traceback" not in ended.stderr
    assert list(tmp_path.iterdir()) == [broken]


def test_a_dry_run_prints_a_recipe_and_its_steps(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe({"kind": "align"}, output="dry")
    (tmp_path / "recipe.yaml").write_text(dump(recipe))
    out = run("finetune", str(tmp_path / "recipe.yaml"), "stages.0.tokens=1280", "--dry-run")
    assert parse_recipe(out).stages[0].steps == 10
    assert "# 1-align        10        128" in out
    assert not RunFolder(recipe).recipe_file.exists()


def test_finetune_converts_trains_and_stops_on_sigterm(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe({"kind": "align", "tokens": "10M"}, output="long")
    folder = RunFolder(recipe)
    folder.converted.unlink()
    (tmp_path / "recipe.yaml").write_text(dump(recipe))
    process = subprocess.Popen(
        [sys.executable, "-m", "t2r", "finetune", str(tmp_path / "recipe.yaml")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while not folder.stages[0].log.is_file() or len(folder.stages[0].log.read_text().splitlines()) < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in errors
    assert "SIGTERM: saving at the next step, then ending." in errors
    assert (folder.converted / "config.json").is_file()
    assert checkpoints.newest_verified(folder.stages[0].checkpoints)
