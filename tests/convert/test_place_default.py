"""`t2r convert` places slots by head unasked, and says so in one line where it does not."""

import json
import shutil

import pytest
import torch

from t2r.cli import place
from t2r.model import load

SMALL = ("--layers", "4,5", "--slots", 24)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(place, "WINDOWS", 1)
    monkeypatch.setattr(place, "WINDOW", 160)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def slots(folder):
    entries = json.loads((folder / "config.json").read_text())["mixers"]
    assert entries[:4] == [None] * 4
    return [entry["slots"] for entry in entries[4:]]


def test_slots_are_placed_by_default(t2r, embedded_teacher, tmp_path):
    answer = t2r("convert", embedded_teacher, tmp_path / "student", *SMALL)
    assert answer.code == 0, answer.err
    found = slots(tmp_path / "student")
    assert f"slots by layer: softmax  softmax  softmax  softmax  {found[0]}  {found[1]}" in answer.err
    assert any(isinstance(each, list) for each in found)
    assert sum(sum(each) if isinstance(each, list) else 2 * each for each in found) <= 24 * 4
    model, _ = load(tmp_path / "student", device="cpu")
    assert model.config.mixers[5]["slots"] == found[1]

    text = tmp_path / "mine.txt"
    text.write_text("the same words again and again, " * 100)
    answer = t2r("convert", embedded_teacher, tmp_path / "mine", *SMALL, "--place", text)
    assert answer.code == 0, answer.err
    assert slots(tmp_path / "mine") != found


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--place", "none"], ""),
        (["--set", "slots=[16, 32]"], ""),
        (["--mixer", "gla"], ""),
        (["--style", "paper"], ""),
        (["--slots", "8"], "not placed (fewer than 16 on average)"),
        (["--dry-run"], "the conversion itself places them by head, measured on shipped:demo/data/train.parquet"),
    ],
)
def test_no_model_runs_where_nothing_is_placed(t2r, embedded_teacher, monkeypatch, options, told):
    monkeypatch.setattr(place, "_measure", lambda *args, **kwargs: pytest.fail("measured"))
    answer = t2r("convert", embedded_teacher, *options, *(() if "--dry-run" in options else ("--dry-run",)))
    assert answer.code == 0, answer.err
    assert told in answer.err
    assert answer.err.count("slots:") == bool(told)


def test_one_line_tells_why_slots_are_the_same_everywhere(t2r, embedded_teacher, tmp_path, monkeypatch):
    def told(reason):
        answer = t2r("convert", source, tmp_path / "student", *SMALL, "--overwrite")
        assert answer.code == 0, answer.err
        assert slots(tmp_path / "student") == [24, 24]
        (line,) = [line for line in answer.err.splitlines() if line.startswith("slots:")]
        assert line.startswith("slots: the same in every head, not placed (")
        assert reason in line

    source = tmp_path / "source"
    shutil.copytree(embedded_teacher, source)
    monkeypatch.setattr(place, "WINDOWS", 10**4)
    told("windows of 160 need one more than that")
    monkeypatch.setattr(place, "WINDOWS", 1)
    (source / "tokenizer.json").write_text('{"version": "1.0"}')
    told("cannot be loaded")
    monkeypatch.setattr(place, "CPU_PARAMETERS", 10**6)
    told("no GPU, for 4,394,240 parameters")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**9, 10**11))
    told("2.2 GB needed, 1.0 GB free on the GPU")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--place", "nowhere.txt"], "no such file or folder"),
        (["--place", "{tmp}/short.txt"], "windows of 160 need one more than that"),
        (["--place", "{tmp}/short.txt", "--mixer", "gla"], "mixer gla has none to place"),
        (["--place", "{tmp}/short.txt", "--set", "slots=[16, 32]"], "are one for each head already"),
        (["--place", "{tmp}/short.txt", "--slots", "8"], "must be at least 16"),
    ],
)
def test_what_was_asked_for_and_cannot_be_leaves_nothing(t2r, embedded_teacher, tmp_path, options, told):
    (tmp_path / "short.txt").write_text("A few words.")
    answer = t2r("convert", embedded_teacher, tmp_path / "student", *(x.format(tmp=tmp_path) for x in options))
    assert answer.code == 2
    assert answer.err.splitlines()[-1].startswith("Error: ")
    assert told in answer.err.splitlines()[-1]
    assert not (tmp_path / "student").exists()


def test_an_interruption_leaves_nothing(t2r, embedded_teacher, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("t2r.convert.select_slots.head_costs", interrupted)
    answer = t2r("convert", embedded_teacher, tmp_path / "student", *SMALL)
    assert (answer.code, answer.err.splitlines()[-1]) == (130, "Interrupted.")
    assert list(tmp_path.iterdir()) == []
