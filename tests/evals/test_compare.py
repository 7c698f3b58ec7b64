"""Paired statistics against values known from elsewhere."""

import math

import numpy as np
import pytest

from t2r_evals import compare, schema


@pytest.mark.parametrize(
    ("wins", "losses", "p"),
    [(0, 0, 1.0), (0, 6, 0.03125), (1, 8, 0.0390625), (5, 5, 1.0), (3, 12, 2 * 576 / 2**15)],
)
def test_mcnemar_is_the_two_sided_binomial(wins: int, losses: int, p: float) -> None:
    # 576 = sum of C(15, k) for k = 0..3
    assert compare.mcnemar_exact(wins, losses) == pytest.approx(p)


def test_interval_of_a_known_sample() -> None:
    # Student's sleep data (1908): differences of two drugs on ten patients, 95% interval 0.70 to 2.46.
    sleep = np.array([1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4])
    mean, low, high = compare.paired_interval(sleep)
    assert (mean, low, high) == pytest.approx((1.58, 0.7001142, 2.4598858), abs=1e-6)


def test_one_item_has_no_interval() -> None:
    assert compare.paired_interval(np.array([2.0])) == (2.0, -math.inf, math.inf)


@pytest.mark.parametrize(
    ("value", "baseline", "chance", "expected"),
    [(0.5, 0.75, 0.25, 0.5), (0.3, 0.25, 0.25, None), (0.2, 0.75, 0.25, -0.1)],
)
def test_recovered(value: float, baseline: float, chance: float, expected: float | None) -> None:
    assert compare.recovered(value, baseline, chance) == (None if expected is None else pytest.approx(expected))


def test_teacher_near_chance_leaves_recovered_blank(report: schema.Report) -> None:
    flat = np.array([1.0, 0.0, 0.0, 0.0] * 10)
    told = {"measurement": "t", "metric": "acc", "model": "a", "baseline": "b"}
    # 10 of 40 right: 0.25 with a standard error of 0.069
    found = compare.compare_values(flat, flat, **told, chance=0.2)
    assert found.recovered is None
    assert (found.wins, found.losses, found.ties) == (0, 0, 40)
    assert compare.compare_values(flat, flat, **told, chance=0.15).recovered is None  # 1.4 standard errors away
    assert compare.compare_values(flat, flat, **told, chance=0.1).recovered == 1.0
    assert compare.compare_values(flat[:1], flat[:1], **told, chance=0.1).recovered is None  # one item has no error


def test_report_pairs_every_model_with_the_teacher(report: schema.Report) -> None:
    found = compare.compare_all(report.results)
    pairs = [("student", "teacher"), ("no training", "teacher"), ("window only", "teacher")]
    pairs += [("student", "no training"), ("student", "window only")]
    assert [(c.model, c.baseline, c.measurement) for c in found] == [
        (*pair, what) for pair in pairs for what in ("language", "arc_easy")
    ]
    student = next(c for c in found if c.model == "student" and c.measurement == "arc_easy")
    assert (student.wins, student.losses) == (10, 20)
    assert student.difference == pytest.approx(-0.05)
    assert student.recovered == pytest.approx((0.70 - 0.25) / (0.75 - 0.25))
    language = next(c for c in found if c.model == "student" and c.measurement == "language")
    assert language.mcnemar_p is None
    assert language.losses == language.items == 24  # a higher loss is worse


def test_changed_documents_never_pair(report: schema.Report) -> None:
    teacher, student = report.results[:2]
    moved = student.model_copy(update={"samples": [{**row, "doc_hash": "other"} for row in student.samples]})
    assert [c.measurement for c in compare.compare_pair(moved, teacher)] == ["language"]


def test_examples_are_what_the_teacher_had_right(report: schema.Report) -> None:
    examples = compare.worst_examples(report.results)
    assert [e.document for e in examples] == ["arc_easy/130", "arc_easy/131", "arc_easy/132"]
    every = compare.worst_examples(report.results, per_task=200)
    assert [e.document for e in every] == [f"arc_easy/{index}" for index in range(130, 150)]  # both wrong: from 180 on
    assert examples[0].baseline_response == "A"
    assert examples[0].model_response == "B"
