"""lm-eval tasks by name, offline where asked, with the settings that keep results comparable."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from t2r_evals.schema import TaskResult


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    shots: int | None,
    limit: int | None,
    batch_size: int,
    max_length: int,
    offline_root: Path | None,
    tasks_root: Path | None,
    seed: int,
    folder: Path | None,
) -> tuple[dict[str, TaskResult], list[dict[str, Any]]]:
    """Results by task name, and one row per document, metric and task: {task, doc_id, doc_hash, metric, value, ...}."""
    raise NotImplementedError
