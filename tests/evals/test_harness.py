"""lm-eval tasks from a local data tree, with a model of two layers."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from t2r_evals import EvaluationOptions, InputError, compare, evaluate, harness, language
from t2r_evals.offline import offline_data, tree_key
from t2r_evals.suites import SUITES, TaskSpec, resolve_tasks


def run(model: Any, tokenizer: Any, tree: Path, *specs: TaskSpec, folder: Path | None = None, **changed: Any) -> Any:
    settings: dict[str, Any] = {"limit": 6, "batch_size": 4, "max_length": 512} | changed
    return harness.run_tasks(
        model, tokenizer, specs, offline_root=tree, tasks_root=None, seed=0, folder=folder, **settings
    )


@pytest.fixture(scope="module")
def hub(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield shared / "hub"


def test_scoring_offline_and_batch_one_equals_batch_four(model: Any, tokenizer: Any, hub: Path) -> None:
    specs = (TaskSpec("arc_easy", "acc", 0), TaskSpec("winogrande", "acc", 2))
    results, rows = run(model, tokenizer, hub, *specs)
    alone, alone_rows = run(model, tokenizer, hub, *specs, batch_size=1)
    assert results["arc_easy"].chance == pytest.approx(0.25, abs=0.05)
    assert results["winogrande"].chance == 0.5
    assert (results["winogrande"].shots, results["winogrande"].documents) == (2, 6)
    assert results["arc_easy"].primary == "acc"
    assert results["arc_easy"].version
    assert [row["value"] for row in rows] == [row["value"] for row in alone_rows]
    assert all(alone[name].metrics == results[name].metrics for name in results)
    accuracy = [row["value"] for row in rows if row["task"] == "arc_easy" and row["metric"] == "acc"]
    assert sum(accuracy) / 6 == pytest.approx(results["arc_easy"].metrics["acc"].value)


def test_generation_offline_with_truncation_counted(model: Any, tokenizer: Any, hub: Path) -> None:
    spec = TaskSpec("squad_completion", "contains", 0, (("until", ["\n"]), ("max_gen_toks", 4)))
    results, rows = run(model, tokenizer, hub, spec, limit=2, max_length=128)
    result = results["squad_completion"]
    assert result.truncated == 2  # a byte-level tokenizer makes these passages longer than 124 tokens
    assert result.chance == 0
    assert {row["metric"] for row in rows} == {"contains"}
    # lm-eval gives none for a task with its own aggregation
    assert result.metrics["contains"].stderr == pytest.approx(
        compare.standard_error(np.array([r["value"] for r in rows]))
    )


def test_finished_tasks_are_not_run_again(
    model: Any, tokenizer: Any, hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = TaskSpec("winogrande", "acc", 0)
    first, rows = run(model, tokenizer, hub, spec, limit=2, folder=tmp_path)
    assert "winogrande (task 1 of 1)\n" in capsys.readouterr().err
    again, again_rows = run(model, tokenizer, hub, spec, limit=2, folder=tmp_path)
    assert (again, again_rows) == (first, rows)
    assert capsys.readouterr().err == "winogrande (task 1 of 1): evaluated before, kept\n"
    run(model, tokenizer, hub, spec, limit=3, folder=tmp_path)
    assert "kept" not in capsys.readouterr().err


def test_the_same_weights_in_another_configuration_are_another_model(
    model: Any, tokenizer: Any, hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As window-only controls of one teacher are, which differ in the window alone."""
    other = copy.deepcopy(model)
    other.config.sliding_window = 16
    spec = TaskSpec("winogrande", "acc", 0)
    for one in (model, other):
        run(one, tokenizer, hub, spec, limit=1, folder=tmp_path)
        assert "kept" not in capsys.readouterr().err


def test_group_is_one_result_and_its_documents_keep_apart(
    model: Any, tokenizer: Any, hub: Path, tmp_path: Path
) -> None:
    """As mmlu and bbh are: one score over subtasks, here a group of our own from a folder that was named."""
    (tmp_path / "pair.yaml").write_text(
        "group: pair\ntask: [arc_easy, winogrande]\n"
        "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\nmetadata: {version: 7}\n"
    )
    results, rows = harness.run_tasks(
        model,
        tokenizer,
        [TaskSpec("pair", "acc", 1)],
        limit=4,
        batch_size=4,
        max_length=512,
        offline_root=hub,
        tasks_root=tmp_path,
        seed=0,
        folder=None,
    )
    assert list(results) == ["pair"]
    pair = results["pair"]
    assert (pair.documents, pair.shots, pair.version, pair.primary) == (8, 1, "7", "acc")
    assert pair.chance == pytest.approx(0.375, abs=0.05)
    accuracy = {row["document"]: row["value"] for row in rows if row["metric"] == "acc"}
    assert len(accuracy) == 8
    assert sum(accuracy.values()) / 8 == pytest.approx(pair.metrics["acc"].value)


def test_tree_without_the_data_is_one_line(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no data at .* for piqa \(baber/piqa\), fda \(hazyresearch/based-fda\)$"):
        run(model, tokenizer, tmp_path, TaskSpec("piqa"), TaskSpec("fda"))
    with pytest.raises(InputError, match=r"for fda \(hazyresearch/based-fda\), swde \(hazyresearch/based-swde-v2\)"):
        harness.check_data(["recall"], [], tmp_path)


def test_missing_data_is_told_before_anything_is_measured(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language, "measure", lambda *_, **__: pytest.fail("measured"))
    options = EvaluationOptions(suites=("language",), tasks=("piqa",), offline_root=tmp_path)
    with pytest.raises(InputError, match="no data at"):
        evaluate(model, tokenizer, name="m", role="student", documents=["text " * 99], options=options)


def test_unknown_task_names_the_nearest(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'hellaswag'"):
        run(model, tokenizer, tmp_path, TaskSpec("hellaswga"))


def test_a_path_is_no_task_name(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    """lm-eval itself would load a definition from a path, and a definition may run code."""
    definition = tmp_path / "mine.yaml"
    definition.write_text("task: mine\ndataset_path: x\n")
    with pytest.raises(InputError, match="is no lm-eval task"):
        run(model, tokenizer, tmp_path, TaskSpec(str(definition)))


def test_offline_block_puts_everything_back(tmp_path: Path) -> None:
    import os

    import datasets

    before = (Path.cwd(), datasets.config.HF_DATASETS_CACHE, os.environ.get("HF_DATASETS_CACHE"))

    def fail_inside() -> None:
        with offline_data(tmp_path):
            assert Path.cwd() == tmp_path
            assert tree_key(tmp_path) in str(datasets.config.HF_DATASETS_CACHE)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_inside()
    assert (Path.cwd(), datasets.config.HF_DATASETS_CACHE, os.environ.get("HF_DATASETS_CACHE")) == before


def test_trees_that_look_alike_have_caches_of_their_own(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "org").mkdir(parents=True)
        (tmp_path / name / "org" / "README.md").write_text("same")
    assert tree_key(tmp_path / "a") != tree_key(tmp_path / "b")


def test_suites_name_tasks_that_lm_eval_has() -> None:
    harness.check_tasks(tuple(SUITES), (), None)


def test_suite_settings_win_over_plain_names_and_shots_over_both() -> None:
    specs = {spec.task: spec for spec in resolve_tasks(["commonsense"], ["arc_easy", "sciq"], None)}
    assert specs["arc_easy"].metric == "acc"
    assert specs["sciq"].shots is None
    assert resolve_tasks([], ["nq_open"], None) == [spec for spec in SUITES["knowledge"] if spec.task == "nq_open"]
    assert {spec.shots for spec in resolve_tasks(["commonsense"], ["sciq"], 3)} == {3}
    with pytest.raises(InputError, match="did you mean 'commonsense'"):
        resolve_tasks(["comonsense"], [], None)


def test_evaluate_restores_training_mode_and_needs_text_for_language(model: Any, tokenizer: Any) -> None:
    options = EvaluationOptions(suites=("language",), windows=1, window=32, batch_size=1)
    with pytest.raises(InputError, match="needs documents"):
        evaluate(model, tokenizer, name="m", role="student", documents=None, options=options)
    model.train()
    result = evaluate(model, tokenizer, name="m", role="student", documents=["some text " * 9], options=options)
    assert model.training
    model.eval()
    assert result.language is not None
    assert result.parameters == sum(p.numel() for p in model.parameters())
