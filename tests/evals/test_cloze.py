"""Contextual cloze tasks, and the data tree that offline evaluation reads."""

from pathlib import Path
from typing import Any

import datasets
import pytest

from t2r_evals import InputError, cloze, harness
from t2r_evals.suites import TaskSpec
from t2r_evals.tree import make_tree

FILLER = "Nothing of note happened on that day in the valley. "


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data tree with one cloze task of three documents; one has no answer."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "source" / "hazyresearch" / "based_drop"
    folder.mkdir(parents=True)
    long = FILLER * 30 + "The mill was built by Edith Crane. " + FILLER * 30
    rows = [
        {"context": long, "question": "The mill was built by", "answers": ["Edith Crane", "Crane"]},
        {"context": "Short [PAR] passage on Rome.", "question": "It is on", "answers": ["Rome"]},
        {"context": "No answer here.", "question": "What is", "answers": [""]},
    ]
    datasets.Dataset.from_list(rows).to_parquet(folder / "validation.parquet")
    files = "  data_files:\n  - split: validation\n    path: validation.parquet\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n{files}---\n")
    return tmp_path / "source"


def test_cut_keeps_the_answer_and_the_length(tokenizer: Any) -> None:
    for before in (0, 3, 40, 80):
        context = FILLER * before + "Edith Crane" + FILLER * (80 - before)
        for room in (60, 200):
            kept = cloze.cut(tokenizer, context, ["Edith Crane"], room)
            assert "Edith Crane" in kept
            assert kept in context
            assert len(tokenizer(kept, add_special_tokens=False)["input_ids"]) == room
    assert cloze.cut(tokenizer, "short", ["absent"], 100) == "short"
    assert cloze.cut(tokenizer, FILLER * 9, ["absent"], 50) == (FILLER * 9)[:50]


def test_task_runs_with_its_prompts_inside_the_context(model: Any, tokenizer: Any, source: Path) -> None:
    results, rows = harness.run_tasks(
        model,
        tokenizer,
        [TaskSpec("cloze_drop")],
        limit=None,
        batch_size=2,
        max_length=256,
        offline_root=source,
        tasks_root=None,
        seed=0,
        folder=None,
    )
    assert results["cloze_drop"].documents == 2
    assert results["cloze_drop"].truncated == 0
    assert rows[0]["prompt"].endswith(". The mill was built by")
    assert "Edith Crane" in rows[0]["prompt"]
    assert rows[1]["prompt"] == "Short  passage on Rome. It is on"


@pytest.mark.parametrize(
    ("text", "score"), [(" edith crane, in 1850", 1.0), (" CRANE", 1.0), (" Edith", 0.0), ("", 0.0)]
)
def test_contains(text: str, score: float) -> None:
    assert cloze.contains_any({"answers": ["Edith Crane", "Crane"]}, [text]) == {"contains": score}


def test_tree_made_of_a_tree_reads_the_same(source: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    assert make_tree([TaskSpec("cloze_drop")], made, offline_root=source) == [made / "hazyresearch" / "based_drop"]
    from t2r_evals.offline import offline_data

    rows = []
    for root in (source, made):
        with offline_data(root):
            rows.append(datasets.load_dataset("hazyresearch/based_drop")["validation"].to_list())
    assert rows[0] == rows[1]
    assert make_tree([TaskSpec("cloze_drop")], made, offline_root=source) == []
    absent = r"no data at .* for cloze_nq \(hazyresearch/based_nq_2048\), mmlu_anatomy \(cais/mmlu\)"
    with pytest.raises(InputError, match=absent):
        make_tree([TaskSpec(name) for name in ("cloze_drop", "cloze_nq", "mmlu_anatomy")], made, offline_root=source)


def test_a_tree_grows_by_the_configurations_that_it_lacks(shared: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    made, arc = tmp_path / "made", tmp_path / "made" / "allenai" / "ai2_arc"
    for task in ("arc_easy", "arc_challenge"):
        assert make_tree([TaskSpec(task)], made, offline_root=shared / "hub") == [arc]
    assert sorted(path.name for path in arc.iterdir()) == ["ARC-Challenge", "ARC-Easy", "README.md"]
    from t2r_evals.offline import offline_data

    with offline_data(made):
        assert len(datasets.load_dataset("allenai/ai2_arc", "ARC-Easy")["test"]) == 2376
        assert len(datasets.load_dataset("allenai/ai2_arc", "ARC-Challenge")["test"]) == 1172
