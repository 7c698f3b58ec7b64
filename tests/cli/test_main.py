"""The command line as a user meets it: real processes, exit codes, and the whole path in small."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from t2r.cli import VERBS
from t2r.publish import verify_manifest

SMALL = [
    *("stages.0.tokens=4096", "stages.1.tokens=4096", "data.sequence_length=256"),
    *("stages.0.batch_tokens=2048", "stages.1.batch_tokens=2048", "evaluate.windows=4", "evaluate.window=128"),
    *("generate.max_new_tokens=8", "stages.0.evaluate_windows=1", "stages.1.evaluate_windows=1"),
]


def t2r(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "t2r", *arguments], capture_output=True, text=True, timeout=300, cwd=cwd
    )


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['t2r', '--help']\n"
        "try:\n    from t2r.cli import main; main()\n"
        "except SystemExit: pass\n"
        "print({'torch', 'transformers', 'pydantic', 'numpy'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "set()"
    assert all(verb in run.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb):
    from click.testing import CliRunner

    from t2r.cli import cli

    result = CliRunner().invoke(cli, [verb, "--help"])
    assert result.exit_code == 0
    assert "Usage:" in result.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["runn", "demo"], "did you mean 'run'"),
        (["--wrong"], "No such option"),
        (["run"], "Missing argument"),
        (["run", "demo", "--wrong"], "No such option"),
        (["run", "no-such-recipe"], "no-such-recipe"),
        (["run", "demo", "stages.0.lrr=1"], "did you mean 'lr'"),
        (["info", "no/such/folder"], "no/such/folder"),
        (["run", "demo", "data.source=no.txt"], "data.source no.txt: no such file"),
        (["finetune", "demo", "data.validation.source=no.txt"], "data.source no.txt: no such file"),
        (["finetune", "demo", "data.text_field=txt"], "no column 'txt'; columns are"),
        (["run", "demo", "evaluate.windows=9999"], "windows=9999 needs"),
        (["run", "demo", "evaluate={suites: [synthetic], recall_lengths: [9]}"], "9 tokens are too few for a look-up"),
        (["run", "demo", "model.source=nowhere"], "nowhere: no such folder, and not a Hub id"),
        (["finetune", "demo", "mixer={name: gsa, layers: 3-99}"], "'3-99' in '3-99' must lie in 0-5"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments, says, tmp_path):
    run = t2r(*arguments, cwd=tmp_path)
    assert run.returncode == 2
    assert run.stdout == ""
    (line,) = run.stderr.strip().splitlines()
    assert line.startswith("Error: ")
    assert says in line
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line_and_exit_code_1(tmp_path):
    """A limit on the size of files, which python reports as it does a full disk."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    run = subprocess.run(
        [sys.executable, "-m", "t2r", "convert", "shipped:demo/teacher", "student", "--place", "none"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        preexec_fn=limit,
    )
    assert run.returncode == 1
    assert run.stderr == "Error: [Errno 27] File too large\n"
    assert not list(tmp_path.iterdir())


def test_demo_keeps_its_promise_on_tokens():
    from t2r.recipe import load_recipe

    recipe = load_recipe("demo", [])
    assert sum(stage.tokens for stage in recipe.stages) <= 500_000
    assert [stage.kind for stage in recipe.stages] == ["align", "distill"]
    assert set(recipe.evaluate.controls) == {"no-training", "window-only"}


@pytest.mark.slow
def test_run_from_teacher_to_report_and_again(tmp_path):
    first = t2r("run", "demo", "output=run", *SMALL, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    folder = tmp_path / "run"
    report = json.loads((folder / "report.json").read_text())
    loss = {result["name"]: result["language"]["loss"] for result in report["results"]}
    assert set(loss) == {"teacher", "student", "no training", "window only"}
    assert loss["teacher"] < loss["student"] < loss["teacher"] + 1.0
    assert [stage["kind"] for stage in report["stages"]] == ["align", "distill"]
    assert len(report["samples"]) == 2
    for name in ("report.md", "report.html", "recipe.yaml", "model/README.md", "model/manifest.json"):
        assert (folder / name).stat().st_size > 0
    for said in (str(Path("run") / "report.html"), "student", "Done in"):
        assert said in first.stdout

    card = (folder / "model" / "README.md").read_text()
    assert "model-index" in card
    assert f"| {loss['student']:.3f} | {loss['teacher']:.3f} |" in card
    assert verify_manifest(folder / "model") == []

    weights = folder / "model" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    again = t2r("run", "demo", "output=run", *SMALL, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert weights.stat().st_mtime_ns == written
    assert again.stderr.count("kept") == 7  # two conversions, the student, four measurements

    other = t2r("run", "demo", "output=run", *SMALL, "mixer.0.slots=32", cwd=tmp_path)
    assert other.returncode == 2
    assert "another recipe" in other.stderr


@pytest.mark.slow
def test_ctrl_c_then_the_same_command_goes_on(tmp_path):
    command = [sys.executable, "-m", "t2r", "run", "demo", "output=run", *SMALL, "stages.0.tokens=400k"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "stages" / "1-align" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.is_file() and log.read_text()):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert list((tmp_path / "run" / "stages" / "1-align" / "checkpoints").glob("step-*"))
    assert not (tmp_path / "run" / "model").exists()
