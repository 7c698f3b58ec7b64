"""Paired comparison of models on the same items: the same windows of text, the same documents of a task.

Two models that see the same items share most of their noise; the paired difference is sharper than the two separate
standard errors suggest, and says which items moved.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from t2r_evals.schema import Comparison, Example, ModelResult

CONFIDENCE = 0.95


def standard_error(values: np.ndarray) -> float:
    """Of the mean of `values` [N]; infinite for one item."""
    return float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.inf


def paired_interval(differences: np.ndarray) -> tuple[float, float, float]:
    """Mean of `differences` [N] with its 95% Student t interval: (mean, low, high). One item: the interval is
    (-inf, inf), for it says nothing about spread."""
    mean = float(np.mean(differences))
    count = len(differences)
    if count < 2:
        return mean, -math.inf, math.inf
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * standard_error(differences)
    return mean, mean - half, mean + half


def mcnemar_exact(wins: int, losses: int) -> float:
    """Two-sided exact p of McNemar's test: the chance of flips this uneven if either direction were equally likely."""
    if wins + losses == 0:
        return 1.0
    return float(stats.binomtest(wins, wins + losses, 0.5).pvalue)


def recovered(value: float, baseline: float, chance: float) -> float | None:
    """(model - chance) / (baseline - chance); None where the baseline is not above chance."""
    if baseline <= chance:
        return None
    return (value - chance) / (baseline - chance)


def compare_values(
    model_values: np.ndarray,
    baseline_values: np.ndarray,
    *,
    measurement: str,
    metric: str,
    model: str,
    baseline: str,
    chance: float | None = None,
    higher_is_better: bool = True,
) -> Comparison:
    """Compare values [N] of the same N items. `wins` are items on which `model` is better.

    `recovered` is blank where the baseline is within two standard errors of chance: the ratio would be noise.
    """
    difference, low, high = paired_interval(model_values - baseline_values)
    sign = 1 if higher_is_better else -1
    wins = int((sign * (model_values - baseline_values) > 0).sum())
    losses = int((sign * (model_values - baseline_values) < 0).sum())
    binary = bool(np.isin(model_values, (0.0, 1.0)).all() and np.isin(baseline_values, (0.0, 1.0)).all())
    value, base = float(model_values.mean()), float(baseline_values.mean())
    above = chance is not None and base - 2 * standard_error(baseline_values) > chance
    return Comparison(
        measurement=measurement,
        metric=metric,
        model=model,
        baseline=baseline,
        items=len(model_values),
        model_value=value,
        baseline_value=base,
        difference=difference,
        low=low,
        high=high,
        wins=wins,
        losses=losses,
        ties=len(model_values) - wins - losses,
        mcnemar_p=mcnemar_exact(wins, losses) if binary else None,
        chance=chance,
        recovered=recovered(value, base, chance) if chance is not None and above else None,
    )


def compare_pair(model: ModelResult, baseline: ModelResult) -> list[Comparison]:
    """Every measurement that both models have on the same items."""
    found = []
    ours, theirs = model.language, baseline.language
    if ours and theirs and ours.data_sha256 == theirs.data_sha256 and ours.window == theirs.window:
        found.append(
            compare_values(
                np.array(ours.window_losses),
                np.array(theirs.window_losses),
                measurement="language",
                metric="loss",
                model=model.name,
                baseline=baseline.name,
                higher_is_better=False,
            )
        )
    for task, result in model.tasks.items():
        mine, other = (_primary_rows(m, task, result.primary) for m in (model, baseline))
        shared = [key for key in mine if key in other]
        if not shared:
            continue
        metric = result.metrics[result.primary]
        found.append(
            compare_values(
                np.array([mine[key]["value"] for key in shared]),
                np.array([other[key]["value"] for key in shared]),
                measurement=task,
                metric=result.primary,
                model=model.name,
                baseline=baseline.name,
                chance=result.chance if metric.higher_is_better else None,
                higher_is_better=metric.higher_is_better,
            )
        )
    return found


def compare_all(results: Sequence[ModelResult]) -> list[Comparison]:
    """Every model against the first teacher, then every student against every control, on what both have measured."""
    teacher = next((result for result in results if result.role == "teacher"), None)
    pairs = [(result, teacher) for result in results if teacher is not None and result is not teacher]
    pairs += [(a, b) for a in results if a.role == "student" for b in results if b.role == "control"]
    return [found for model, baseline in pairs for found in compare_pair(model, baseline)]


def worst_examples(results: Sequence[ModelResult], per_task: int = 3) -> list[Example]:
    """The first documents of each task that the teacher has right and the first student wrong."""
    teacher = next((result for result in results if result.role == "teacher"), None)
    student = next((result for result in results if result.role == "student"), None)
    if teacher is None or student is None:
        return []
    found: list[Example] = []
    for task, result in student.tasks.items():
        rows = [_primary_rows(model, task, result.primary) for model in (student, teacher)]
        lost = [
            key for key, row in rows[0].items() if row["value"] == 0 and rows[1].get(key, {"value": 0})["value"] == 1
        ]
        found += [
            Example(
                task=task,
                model=student.name,
                baseline=teacher.name,
                document=rows[0][key]["document"],
                prompt=rows[0][key]["prompt"],
                target=rows[0][key]["target"],
                model_response=rows[0][key]["response"],
                baseline_response=rows[1][key]["response"],
            )
            for key in lost[:per_task]
        ]
    return found


def _primary_rows(result: ModelResult, task: str, metric: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Per-sample rows of one metric by (document, hash of its content): a changed document never pairs."""
    rows = (row for row in result.samples if row["task"] == task and row["metric"] == metric)
    return {(row["document"], row["doc_hash"]): row for row in rows}
