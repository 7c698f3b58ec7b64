"""From what lm-eval returns for a task to a `TaskResult` and a row per document."""

from typing import Any

import numpy as np

from t2r_evals.compare import standard_error
from t2r_evals.schema import TaskMetric, TaskResult
from t2r_evals.suites import TaskSpec

Samples = list[tuple[str, dict[str, Any]]]  # (leaf task, lm-eval's record of one document)

# The metric that tables show, where a suite names none: the first of these that the task reports.
_PRIMARY = ("acc_norm", "acc", "exact_match", "contains", "f1", "word_perplexity")


def samples_of(name: str, output: Any) -> Samples:
    """Every document of a task, or of the tasks of a group, with the task that it belongs to."""
    return [(leaf, sample) for leaf in _leaves(name, output) for sample in output["samples"][leaf]]


def _leaves(name: str, output: Any) -> list[str]:
    return [name] if name in output["samples"] else list(output["samples"])


def task_result(
    name: str,
    output: Any,
    samples: Samples,
    spec: TaskSpec,
    *,
    limit: int | None,
    max_length: int,
    truncated: int,
    seconds: float,
) -> TaskResult:
    """The result of one task, group or tag.

    Args:
        output: what lm-eval's `evaluate` returned.
        samples: of `samples_of`.
    """
    leaves = _leaves(name, output)
    scores = output["results"][name]
    better: dict[str, bool] = {}
    for leaf in leaves:
        better |= output["higher_is_better"].get(leaf) or {}
    metrics = {}
    for key, value in scores.items():
        metric, _, filter_name = key.partition(",")
        if not filter_name or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = scores.get(f"{metric}_stderr,{filter_name}")
        if not isinstance(stderr, int | float):  # lm-eval has none where a task brings its own aggregation
            stderr = _standard_error(samples, metric, filter_name, value)
        metrics[_metric_name(metric, filter_name)] = TaskMetric(
            value=value,
            stderr=stderr,
            higher_is_better=bool(better.get(metric, True)),
        )
    primary = next((m for wanted in (spec.metric, *_PRIMARY) for m in metrics if m.split(",")[0] == wanted), None)
    documents = {(leaf, sample["doc_id"]) for leaf, sample in samples}
    return TaskResult(
        metrics=metrics,
        primary=primary or next(iter(metrics)),
        chance=_chance(output, samples),
        version=str(output["versions"].get(name, output["versions"].get(leaves[0]))),
        shots=int(output["n-shot"].get(name, output["n-shot"].get(leaves[0], 0))),
        documents=len(documents),
        limit=limit,
        max_length=max_length,
        truncated=truncated,
        seconds=seconds,
    )


def _standard_error(samples: Samples, metric: str, filter_name: str, mean: float) -> float | None:
    """From the documents' own values; None where they are too few, or where the score is not their mean."""
    found = [sample.get(metric) for _, sample in samples if sample["filter"] == filter_name]
    values = [float(value) for value in found if isinstance(value, bool | int | float)]
    if len(values) < 2 or abs(sum(values) / len(values) - mean) > 1e-6:
        return None
    return standard_error(np.array(values))


def _metric_name(metric: str, filter_name: str) -> str:
    return metric if filter_name == "none" else f"{metric},{filter_name}"


def _chance(output: Any, samples: Samples) -> float:
    """Expected accuracy of guessing: mean of 1 / choices over multiple-choice documents, 0 for anything else."""
    chances = []
    for leaf, sample in samples:
        choice = output["configs"][leaf].get("output_type") == "multiple_choice"
        chances.append(1 / len(sample["filtered_resps"]) if choice else 0.0)
    return sum(chances) / max(len(chances), 1)


def sample_rows(name: str, samples: Samples) -> list[dict[str, Any]]:
    """A row per document and metric: {task, document, doc_hash, metric, value, prompt, target, response}."""
    rows = []
    for leaf, sample in samples:
        responses = sample["filtered_resps"]
        for metric in sample["metrics"]:
            value = sample[metric]
            if not isinstance(value, bool | int | float):
                continue  # Corpus metrics (word perplexity, F1 over pairs) have no value per document.
            rows.append(
                {
                    "task": name,
                    "document": f"{leaf}/{sample['doc_id']}",
                    "doc_hash": sample["doc_hash"],
                    "metric": _metric_name(metric, sample["filter"]),
                    "value": float(value),
                    "prompt": str(sample["arguments"][0][0])[-600:],
                    "target": str(sample["target"])[:300],
                    "response": _response(sample["arguments"], responses)[:300],
                }
            )
    return rows


def _response(arguments: list, responses: list) -> str:
    """What the model answered: the generated text, or the continuation it found likeliest."""
    first = responses[0]
    if isinstance(first, str):
        return first
    if len(responses) > 1 and isinstance(first, list | tuple):
        likeliest = max(range(len(responses)), key=lambda index: responses[index][0])
        return str(arguments[likeliest][1])
    return ""
