"""Tasks whose data does not lie beside us run end to end on trees of the same layout: MMLU, BBH, FDA, SWDE, cloze."""

from pathlib import Path
from typing import Any

import datasets
import pytest

from t2r_evals import harness
from t2r_evals.suites import SUITES, TaskSpec, resolve_tasks

PASSAGE = "Device name: Axion Meter. The manufacturer is Harlow Works. It was cleared in May. "


def tree(root: Path, name: str, config: str, **splits: Any) -> None:
    folder = root / name
    lines = [f"- config_name: {config}", "  data_files:"]
    for split, rows in splits.items():
        (folder / config).mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(rows).to_parquet(folder / config / f"{split}.parquet")
        lines += [f"  - split: {split}", f"    path: {config}/{split}.parquet"]
    (folder / "README.md").write_text("\n".join(["---", "configs:", *lines, "---", ""]))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    question = {
        "question": "Which organ pumps blood?",
        "subject": "anatomy",
        "choices": ["Liver", "Heart", "Skin", "Eye"],
    }
    tree(tmp_path, "cais/mmlu", "anatomy", test=[{**question, "answer": i % 4} for i in range(4)],
         validation=[{**question, "answer": 1}], dev=[{**question, "answer": 1} for _ in range(5)])  # fmt: skip
    tree(tmp_path, "SaylorTwift/bbh", "boolean_expressions", test=[{"input": "not ( True ) is", "target": "False"}] * 3)
    for name in ("fda", "swde-v2"):
        rows = [{"text": PASSAGE * 3 + "The manufacturer is", "value": "Harlow Works"}] * 3
        tree(tmp_path, f"hazyresearch/based-{name}", "default", validation=rows)
    for name in ("nq_2048", "triviaqa", "drop"):
        documents = [{"context": PASSAGE * 40, "question": "The manufacturer is", "answers": ["Harlow Works"]}] * 3
        tree(tmp_path, f"hazyresearch/based_{name}", "default", validation=documents)
    return tmp_path


def test_every_task_without_data_of_its_own_runs_on_its_layout(model: Any, tokenizer: Any, root: Path) -> None:
    recall = [spec for spec in SUITES["recall"] if spec.task != "squad_completion"]
    bbh, mmlu = (spec for spec in SUITES["knowledge"] if spec.task in ("mmlu", "bbh"))
    parts = [TaskSpec("mmlu_anatomy", mmlu.metric, mmlu.shots)]
    parts += [TaskSpec("bbh_cot_fewshot_boolean_expressions", bbh.metric, bbh.shots, (("max_gen_toks", 8),))]
    results, rows = harness.run_tasks(
        model,
        tokenizer,
        recall + parts,
        limit=2,
        batch_size=2,
        max_length=1024,
        offline_root=root,
        tasks_root=None,
        seed=0,
        folder=None,
    )
    assert {name: (r.primary.split(",")[0], r.shots, r.documents) for name, r in results.items()} == {
        **{spec.task: ("contains", 0, 2) for spec in recall},
        "mmlu_anatomy": ("acc", 5, 2),
        "bbh_cot_fewshot_boolean_expressions": ("exact_match", 3, 2),
    }
    assert results["mmlu_anatomy"].chance == 0.25
    assert results["mmlu_anatomy"].truncated == 0
    assert results["bbh_cot_fewshot_boolean_expressions"].truncated == 2  # three worked examples are over 1,000 bytes
    cloze = [row for row in rows if row["task"].startswith("cloze_")]
    assert len(cloze) == 6
    assert all("Harlow Works" in row["prompt"] for row in cloze)  # cut around the answer, though far too long
    assert all(results[name].truncated == 0 for name in results if name.startswith("cloze_"))


def test_the_groups_of_the_suite_hold_these_tasks() -> None:
    manager = harness.task_manager(None)
    for group, member in (("mmlu", "mmlu_anatomy"), ("bbh", "bbh_cot_fewshot_boolean_expressions")):
        assert group in {spec.task for spec in resolve_tasks(["knowledge"], [], None)}
        assert group in manager.task_index
        assert member in manager.task_index
