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


def test_placed_rows_spend_what_their_names_say():
    from t2r.model import assign_mixers

    def spent(name):
        mixers = load_recipe(ROWS[name]["recipe"], ROWS[name]["overrides"]).mixer
        return [entry and _by_head(entry) for entry in assign_mixers(mixers, 8)]

    assert sum(map(sum, spent("gsa-uniform"))) == 16 * 64
    for name, mean in (("gsa", 64), ("gsa-far", 64), ("gsa-layers", 64), ("gsa-32", 32), ("gsa-128", 128)):
        assert 0.97 * 16 * mean <= sum(map(sum, spent(name))) <= 16 * mean, name
    for windows, slots in (("window-heads", "gsa"), ("window-far", "gsa-far"), ("window-layers", "gsa-layers")):
        assert spent(windows) == spent(slots)


def _by_head(entry):
    """Slots, or sinks and window, of each of two heads."""
    sizes = entry["slots"] if entry["name"] == "gsa" else entry["window"]
    extra = 0 if entry["name"] == "gsa" else entry["sinks"]
    return [size + extra for size in (sizes if isinstance(sizes, list) else [sizes, sizes])]


def test_the_page_shows_the_stored_records():
    records = [json.loads(line) for line in (ROOT / "docs/recovery/results.jsonl").read_text().splitlines()]
    assert recovery.table(records, ROWS) in (ROOT / "docs/recovery.md").read_text()


def test_a_wrong_table_is_told(tmp_path):
    table = tmp_path / "table.yaml"
    table.write_text("- {name: a, overides: []}\n")
    with pytest.raises(SystemExit, match="row a: unknown key overides"):
        recovery.read_table(table)
    table.write_text("- {name: a}\n- {name: a}\n")
    with pytest.raises(SystemExit, match="row a: is there twice"):
        recovery.read_table(table)


def record(row, seed, excess, state_bytes=2048):
    rates = {"1-align": 1.0, "2-distill": 2.0}
    far = {"excess_far": 2 * excess, "state_bytes": state_bytes, "tokens_per_second": rates}
    return {"row": row, "seed": seed, "excess": excess, **far}


def test_medians_leave_failed_runs_out():
    failed = {"row": "a", "seed": 3, "error": "InputError: no"}
    records = [record("a", 0, 0.3), record("a", 1, 0.1), record("a", 2, 0.2), failed, record("b", 0, 0.5)]
    lines = recovery.table(
        records, {"a": {"about": "one"}, "b": {"about": "two"}, "c": {"about": "three"}}
    ).splitlines()
    assert lines[2:] == [
        "| a | one | align, distill | 3 |  | +0.200 (+0.100 .. +0.300) | +0.400 (+0.200 .. +0.600) | 2 |",
        "| b | two | align, distill | 1 |  | +0.500 | +1.000 | 2 |",
    ]
    assert recovery.one_line(failed).endswith("FAILED: InputError: no")


def test_render_draws_the_curves_of_the_table(tmp_path, monkeypatch):
    results = tmp_path / "results.jsonl"
    lines = [record("gsa", 0, 0.2, 1024), record("gsa-128", 0, 0.125, 4096), record("window", 0, 0.3)]
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(sys, "argv", ["recovery.py", "--render", str(results), "--output", str(tmp_path)])
    recovery.main()
    assert (tmp_path / "table.md").read_text().count("\n") == 5
    svg = (tmp_path / "state.svg").read_text()
    assert "placed by head, far repeats: 0.25 at 4" in svg
    assert "window" not in svg


@pytest.mark.slow
def test_a_row_runs_and_a_broken_one_does_not_stop_it(tmp_path):
    stage = (
        "stages=[{kind: distill, tokens: 1024, batch_tokens: 512, sequence_length: 128, micro_batch_size: 4, lr: 1e-3}]"
    )
    small = ["mixer.slots=16", "place={windows: 1, window: 96}", stage, "evaluate.windows=2", "evaluate.window=256"]
    rows = [{"name": "broken", "overrides": ["mixer.slot=1"]}, {"name": "small", "overrides": small}]
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
