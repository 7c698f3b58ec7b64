"""Evaluation of a real student: the shipped teacher, converted. Batching must not change what tasks say."""

from pathlib import Path
from typing import Any

import pytest
import torch

from t2r_evals import EvaluationOptions, evaluate, harness
from t2r_evals.report.verdict import idle_components
from t2r_evals.suites import TaskSpec

TEXT = "The door opened, and the old man looked at the letter upon the table for a long time before he spoke. "


@pytest.fixture(scope="module")
def student(embedded_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The student with its gates moved off their start, so that the recurrence matters, and the tokenizer."""
    from t2r.convert import convert
    from t2r.model import load, parse_options

    folder = tmp_path_factory.mktemp("student") / "gsa"
    convert(str(embedded_teacher), folder, mixers=[parse_options({"name": "gsa", "slots": 32})], dtype="float32")
    model, tokenizer = load(folder, dtype=torch.float32, device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate_proj" in name or "clock" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model, tokenizer


def test_scoring_and_generation_with_batch_one_and_four_agree(student: Any, shared: Path) -> None:
    specs = [
        TaskSpec("arc_easy", "acc", 1),
        TaskSpec("squad_completion", "contains", 0, (("until", ["\n"]), ("max_gen_toks", 12))),
    ]
    settings: dict[str, Any] = {"limit": 6, "max_length": 512, "tasks_root": None, "seed": 0, "folder": None}
    model, tokenizer = student
    one, four = (
        harness.run_tasks(model, tokenizer, specs, batch_size=size, offline_root=shared / "hub", **settings)
        for size in (1, 4)
    )
    assert [(r["task"], r["document"], r["metric"], r["value"], r["response"]) for r in one[1]] == [
        (r["task"], r["document"], r["metric"], r["value"], r["response"]) for r in four[1]
    ]
    assert any(row["response"].strip() for row in one[1] if row["task"] == "squad_completion")


def test_language_with_batch_one_and_four_agree(student: Any) -> None:
    documents = [TEXT * 20, TEXT[::-1] * 10]
    results = [
        evaluate(
            *student,
            name="student",
            role="student",
            documents=documents,
            options=EvaluationOptions(windows=5, window=96, batch_size=size),
        ).language
        for size in (1, 4)
    ]
    assert results[0] is not None
    assert results[1] is not None
    assert results[1].window_losses == pytest.approx(results[0].window_losses, abs=2e-5)


def test_state_does_not_grow_with_the_context(student: Any) -> None:
    from t2r.model import describe
    from t2r_evals.speed import measure_speed

    points = measure_speed(student[0], [16, 200], decode_tokens=2, repeats=1)
    assert {p.state_bytes for p in points} == {describe(student[0].config)["state_bytes"]}


def test_the_halves_of_a_hybrid_layer_are_switched_off_one_by_one(embedded_teacher: Path, tmp_path: Path) -> None:
    """With all of the share on the window, the recurrence contributes nothing, and that is said."""
    from t2r.cli.measure import hybrid_components
    from t2r.convert import convert
    from t2r.model import load, parse_options

    convert(str(embedded_teacher), tmp_path / "hybrid", mixers=parse_options({"name": "hybrid", "layers": "0-4"}))
    model, tokenizer = load(tmp_path / "hybrid", dtype=torch.float32, device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".mix"):
                parameter.fill_(60.0)
    components = hybrid_components(model)
    assert components is not None
    options = EvaluationOptions(windows=4, window=96)
    result = evaluate(
        model,
        tokenizer,
        name="student",
        role="student",
        documents=[TEXT * 20],
        options=options,
        components=components,
    )
    found = {part.component: part for part in result.components}
    assert {name: part.modules for name, part in found.items()} == {
        "the window of the hybrid layers": 5,
        "the gsa of the hybrid layers": 5,
        "the softmax (host) layers": 1,
    }
    assert found["the gsa of the hybrid layers"].difference == 0
    assert found["the window of the hybrid layers"].low > 0.1
    (warning,) = idle_components(result)
    assert "without the gsa of the hybrid layers" in warning
