"""The script that runs the rows of docs/recovery.md."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from t2r.recipe import load_recipe

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "evals" / "recovery.py"
_spec = importlib.util.spec_from_file_location("recovery_script", SCRIPT)
recovery = importlib.util.module_from_spec(_spec)
sys.modules["recovery_script"] = recovery
_spec.loader.exec_module(recovery)
ROWS = recovery.read_table(ROOT / "evals" / "recovery.yaml")


def test_every_row_trains_on_the_same_tokens_in_the_same_batches():
    for name, row in ROWS.items():
        recipe = load_recipe(row["recipe"], row["overrides"])
        assert sum(stage.steps * stage.batch_tokens for stage in recipe.stages) == 9_830_400, name
        assert {stage.batch_tokens for stage in recipe.stages} == {16384}, name


def test_the_placed_row_spends_what_the_uniform_one_spends():
    from t2r.model import assign_mixers

    spent = {}
    for name in ("gsa", "gsa-uniform", "gsa-128", "gsa-256"):
        entries = assign_mixers(load_recipe("recovery", ROWS[name]["overrides"]).mixer, 8)
        spent[name] = sum(entry["slots"] for entry in entries)
    assert spent["gsa"] == spent["gsa-uniform"] == 8 * 64
    assert spent["gsa-128"] <= 8 * 128
    assert spent["gsa-256"] == 8 * 256


def test_a_wrong_table_is_told(tmp_path):
    table = tmp_path / "table.yaml"
    table.write_text("- {name: a, overides: []}\n")
    with pytest.raises(SystemExit, match="row a: unknown key overides"):
        recovery.read_table(table)
    table.write_text("- {name: a}\n- {name: a}\n")
    with pytest.raises(SystemExit, match="row a: is there twice"):
        recovery.read_table(table)


def test_medians_leave_failed_runs_out():
    def record(seed, excess):
        return {"row": "a", "seed": seed, "excess": excess, "excess_far": 2 * excess, "state_bytes": 2048}

    failed = {"row": "a", "seed": 3, "error": "InputError: no"}
    lines = recovery.table([record(0, 0.3), record(1, 0.1), record(2, 0.2), failed], {"a": {}, "b": {}}).splitlines()
    assert lines[2:] == ["| a | 3 |  | +0.200 | +0.400 | +0.1000 .. +0.3000 | 2 |"]
    assert recovery.one_line(failed).endswith("FAILED: InputError: no")


def test_render_draws_the_curves_of_the_table(tmp_path, monkeypatch):
    results = tmp_path / "results.jsonl"
    record = {"seed": 0, "state_bytes": 1024}
    lines = [
        record | {"row": "gsa", "excess": 0.2, "excess_far": 0.5},
        record | {"row": "gsa-128", "excess": 0.125, "excess_far": 0.375, "state_bytes": 4096},
        record | {"row": "window", "excess": 0.3, "excess_far": 0.9},
    ]
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(sys, "argv", ["recovery.py", "--render", str(results), "--output", str(tmp_path)])
    recovery.main()
    assert (tmp_path / "table.md").read_text().count("\n") == 5
    svg = (tmp_path / "state.svg").read_text()
    assert "placed, far repeats: 0.38 at 4" in svg
    assert "window" not in svg


@pytest.mark.slow
def test_a_row_runs_and_a_broken_one_does_not_stop_it(tmp_path):
    stage = (
        "stages=[{kind: distill, tokens: 1024, batch_tokens: 512, sequence_length: 128, micro_batch_size: 4, lr: 1e-3}]"
    )
    rows = [
        {"name": "broken", "overrides": ["mixer.slot=1"]},
        {"name": "small", "overrides": ["mixer.slots=16", stage, "evaluate.windows=2", "evaluate.window=256"]},
    ]
    table = tmp_path / "table.yaml"
    table.write_text(json.dumps(rows))
    command = [sys.executable, SCRIPT, "--table", table, "--output", tmp_path / "out", "--seeds", "4"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 1, done.stderr
    broken, small = map(json.loads, (tmp_path / "out" / "results.jsonl").read_text().splitlines())
    assert "did you mean 'slots'?" in broken["error"]
    assert (small["row"], small["seed"], small["tokens"]) == ("small", 4, 1024)
    report = json.loads((tmp_path / "out" / "small" / "seed-4" / "report.json").read_text())
    loss = {result["name"]: result["language"]["loss"] for result in report["results"]}
    assert small["excess"] == pytest.approx(loss["student"] - loss["teacher"])
    assert f"excess {small['excess']:+.4f}" in done.stdout
    assert (tmp_path / "out" / "table.md").read_text().strip() in done.stdout
