"""`t2r eval` and `t2r report` from the command line."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from t2r.cli import main

DOCUMENTS = "\n\0\n".join(["The old man looked at the sea. " * 20, "She opened the letter and read it twice. " * 20])


def t2r(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["t2r", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def test_evaluate_beside_a_baseline_then_render_and_compare(
    embedded_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(DOCUMENTS)
    common = ["--text", text, "--windows", 3, "--window", 64, "--device", "cpu"]
    speed = ["--speed", "16,32", "--baseline", embedded_teacher]
    assert t2r(monkeypatch, "eval", embedded_teacher, "--output", tmp_path / "one", *speed, *common) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "one" / "report.html")
    report = json.loads((tmp_path / "one" / "report.json").read_text())
    assert [(r["role"], r["language"]["windows"], len(r["speed"])) for r in report["results"]] == [
        ("teacher", 3, 2),
        ("student", 3, 2),
    ]
    assert report["comparisons"][0]["difference"] == 0
    assert report["results"][1]["language"]["kl_to_teacher"] == pytest.approx(0, abs=1e-6)
    assert report["results"][0]["kv_bytes_per_token"] > 0

    assert t2r(monkeypatch, "report", tmp_path / "one", "--output", tmp_path / "again", "--title", "Again") == 0
    assert (tmp_path / "again" / "report.md").read_text().startswith("# Again\n")
    assert t2r(monkeypatch, "report", tmp_path / "one", tmp_path / "again", "--output", tmp_path / "both") == 0
    capsys.readouterr()
    for verb in (["report", tmp_path / "one"], ["eval", embedded_teacher, *common]):
        assert t2r(monkeypatch, *verb, "--output", text) == 2
        assert capsys.readouterr().err == f"Error: --output {text}: cannot be made: File exists\n"
    names = [r["name"] for r in json.loads((tmp_path / "both" / "report.json").read_text())["results"]]
    assert len(names) == len(set(names)) == 3


def test_interrupt_keeps_what_is_done(
    embedded_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import t2r_evals
    from t2r_evals.schema import ModelResult

    def stop_at_the_student(*_: object, role: str, name: str, **__: object) -> ModelResult:
        if role == "student":
            raise KeyboardInterrupt
        return ModelResult(name=name, role="teacher")

    monkeypatch.setattr(t2r_evals, "evaluate", stop_at_the_student)
    text = tmp_path / "text.txt"
    text.write_text(DOCUMENTS)
    out = tmp_path / "out"
    arguments = [embedded_teacher, "--baseline", embedded_teacher, "--text", text, "--output", out, "--device", "cpu"]
    arguments += ["--windows", 1, "--window", 64]
    assert t2r(monkeypatch, "eval", *arguments) == 130
    report = json.loads((out / "report.json").read_text())
    assert [r["role"] for r in report["results"]] == ["teacher"]
    assert "Interrupted" in report["notes"][0]

    monkeypatch.setattr(t2r_evals, "evaluate", lambda *_, role, name, **__: ModelResult(name=name, role=role))
    capsys.readouterr()
    assert t2r(monkeypatch, "eval", *arguments) == 0
    assert [line.partition(": ")[2] for line in capsys.readouterr().err.splitlines()] == [
        "measured before, kept",
        "measuring",
    ]


def test_too_little_text_is_told_before_a_model_is_loaded(
    embedded_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from t2r.cli.measure import Measuring

    monkeypatch.setattr(Measuring, "result", lambda *_: pytest.fail("measured"))
    (tmp_path / "text.txt").write_text("short")
    arguments = ["eval", embedded_teacher, "--text", tmp_path / "text.txt", "--output", tmp_path / "out"]
    assert t2r(monkeypatch, *arguments) == 2
    assert "windows=48 needs 98305" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_kept_belongs_to_the_model_its_teacher_the_options_and_the_text(
    embedded_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import t2r_evals
    from t2r.cli.measure import Measuring
    from t2r_evals import EvaluationOptions, ModelResult

    calls: list[str] = []

    def evaluate(*_: object, role: str, name: str, **__: object) -> ModelResult:
        calls.append(name)
        return ModelResult(name=name, role=role)

    monkeypatch.setattr(t2r_evals, "evaluate", evaluate)
    options, other = EvaluationOptions(), EvaluationOptions(window=64)
    copied = tmp_path / "model"
    shutil.copytree(embedded_teacher, copied)
    told: tuple[Path, EvaluationOptions, list[str]] = (tmp_path / "kept", options, ["text"])
    settings: list[tuple[tuple[Path, EvaluationOptions, list[str]], Path | None]] = [
        (told, None),
        (told, embedded_teacher),
        ((tmp_path / "kept", other, ["text"]), None),
        ((tmp_path / "kept", options, ["other"]), None),
    ]
    for number, (arguments, teacher) in enumerate(settings, 1):
        for _ in range(2):
            Measuring(*arguments, "float32", "cpu", teacher).result("m", "student", copied)
            assert len(calls) == number
    (copied / "model.safetensors").touch()  # rewritten in its place
    Measuring(*settings[-1][0], "float32", "cpu").result("m", "student", copied)
    assert len(calls) == 5
    kept = tmp_path / "kept" / "m.json"
    kept.write_text(kept.read_text().replace('"role"', '"part"'))  # as another version might have written it
    Measuring(*settings[-1][0], "float32", "cpu").result("m", "student", copied)
    assert len(calls) == 6


def test_a_mistyped_model_is_told_before_any_is_measured(
    embedded_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", embedded_teacher, "--control", tmp_path / "typo", "--speed", 16, "--output", tmp_path / "out"]
    assert t2r(monkeypatch, *arguments) == 2
    assert capsys.readouterr().err == f"Error: {tmp_path / 'typo'}: no such folder, and not a Hub id (org/name)\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval"], "needs a MODEL and --output"),
        (["eval", "x", "--output", "out"], "nothing to measure"),
        (["eval", "x", "--output", "out", "--suite", "language"], "--text FILE"),
        (["eval", "x", "--output", "out", "--suite", "comonsense"], "did you mean 'commonsense'"),
        (["eval", "x", "--output", "out", "--tasks", "hellaswga"], "did you mean 'hellaswag'"),
        (["eval", "x", "--output", "out", "--tasks", "piqa"], "x: no such folder"),
        (["eval", "x", "--output", "out", "--text", "missing.txt"], "missing.txt"),
        (["eval", "x", "--output", "out", "--speed", "1K,zero"], "'zero' is no length"),
        (["eval", "x", "--output", "out", "--tasks", "piqa", "--offline-root", "tree"], "'tree' does not exist"),
        (["eval", "x", "--output", "out", "--tasks", "piqa", "--dtype", "float"], "'float' is not one of"),
        (["eval", "--make-offline-root", "tree"], "name the tasks"),
        (["report", "nowhere", "--output", "out"], "no report there"),
        (["bench", "decode", "--contexts", "1K,zero"], "'zero' is no length"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert t2r(monkeypatch, *arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Error")]
    assert len(lines) == 1
    assert message in lines[0]
    assert list(tmp_path.iterdir()) == []
