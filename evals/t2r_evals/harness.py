"""lm-eval tasks by name, offline where asked, with the settings that keep results comparable.

Log-softmax in fp32, `max_length` always explicit, truncated prompts counted, one task at a time so that what is done
is kept. Task definitions come from lm-eval itself; a folder of others only where the caller names it, because a
definition may run code.
"""

import difflib
import hashlib
import json
import logging
import os
import random
import re
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from t2r_evals.cloze import context_length
from t2r_evals.errors import InputError
from t2r_evals.offline import offline_data, tree_key
from t2r_evals.schema import TaskResult
from t2r_evals.suites import TaskSpec, resolve_tasks
from t2r_evals.task_results import sample_rows, samples_of, task_result

# Task definitions of our own: beside this package in a checkout, with t2r in an installation.
OWN_TASKS = next(
    (
        folder
        for folder in (Path(__file__).parents[1] / "tasks", Path(__file__).parents[1] / "t2r" / "_shipped" / "tasks")
        if folder.is_dir()
    ),
    None,
)


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[TaskSpec],
    *,
    limit: int | None,
    batch_size: int,
    max_length: int,
    offline_root: Path | None,
    tasks_root: Path | None,
    seed: int,
    folder: Path | None,
) -> tuple[dict[str, TaskResult], list[dict[str, Any]]]:
    """Run lm-eval tasks on a model.

    Args:
        folder: keeps each finished task as JSON; a task found there with the same weights and settings is not run
            again, so a stopped evaluation goes on where it was. None keeps nothing.
        Others: as in `EvaluationOptions`.

    Returns:
        Results by task name, and per-sample rows {task, document, doc_hash, metric, value, prompt, target, response}.

    Raises:
        InputError: an unknown task, or no data for some; before any is run.
    """
    folder = folder and Path(folder).resolve()
    manager = task_manager(tasks_root)
    for spec in tasks:
        _check_known(spec.task, manager)
    settings = {
        "limit": limit,
        "max_length": max_length,
        "seed": seed,
        "data": None if offline_root is None else tree_key(Path(offline_root).resolve()),
        "weights": _fingerprint(model) if folder else None,
    }

    def kept_at(spec: TaskSpec) -> Path | None:
        key = hashlib.sha256(json.dumps([spec.as_dict(), settings], sort_keys=True).encode()).hexdigest()[:16]
        return folder / f"{spec.task}-{key}.json" if folder else None

    pending = [spec for spec in tasks if not ((kept := kept_at(spec)) and kept.exists())]
    with context_length(tokenizer, max_length):
        loaded = load_tasks([spec.task for spec in pending], manager, offline_root)
    harness = _harness(model, tokenizer, batch_size, max_length) if pending else None
    results: dict[str, TaskResult] = {}
    rows: list[dict[str, Any]] = []
    for number, spec in enumerate(tasks, 1):
        kept = kept_at(spec)
        if spec not in pending:
            assert kept is not None
            stored = json.loads(kept.read_text(encoding="utf-8"))
            _say(f"{spec.task} (task {number} of {len(tasks)}): evaluated before, kept")
        else:
            _say(f"{spec.task} (task {number} of {len(tasks)})")
            stored = _run_one(harness, spec, loaded.pop(spec.task), limit=limit, seed=seed)
            if kept is not None:
                kept.parent.mkdir(parents=True, exist_ok=True)
                partial = kept.with_suffix(".partial")
                partial.write_text(json.dumps(stored), encoding="utf-8")
                os.replace(partial, kept)
        results |= {name: TaskResult.model_validate(value) for name, value in stored["results"].items()}
        rows += stored["rows"]
    return results, rows


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def check_tasks(suites: Sequence[str], tasks: Sequence[str], tasks_root: Path | None) -> None:
    """Fail before any model is loaded: InputError on an unknown suite or task."""
    specs = resolve_tasks(suites, tasks, None)
    if specs:
        manager = task_manager(tasks_root)
        for spec in specs:
            _check_known(spec.task, manager)


@cache
def task_manager(tasks_root: Path | None) -> Any:
    """lm-eval's index of its thousands of definitions; reading them takes seconds, once per process."""
    from lm_eval.tasks import TaskManager

    if tasks_root is not None and not Path(tasks_root).is_dir():
        raise InputError(f"tasks_root: {tasks_root} is not a folder")
    with _quiet():
        return TaskManager(include_path=[str(Path(root).resolve()) for root in (OWN_TASKS, tasks_root) if root])


def _check_known(name: str, manager: Any) -> None:
    # lm-eval reads any other string as the path of a definition, which may run code: only registered names pass.
    if name not in manager.task_index:
        near = difflib.get_close_matches(name, manager.all_tasks, n=1)
        raise InputError(f"tasks: {name!r} is no lm-eval task" + (f"; did you mean {near[0]!r}?" if near else ""))


def check_data(suites: Sequence[str], tasks: Sequence[str], offline_root: Path | None) -> None:
    """InputError unless every task's data can be loaded, from `offline_root` or the Hub."""
    specs = resolve_tasks(suites, tasks, None)
    with context_length(None, 0):
        load_tasks([spec.task for spec in specs], task_manager(None) if specs else None, offline_root)


def load_tasks(names: Sequence[str], manager: Any, offline_root: Path | None) -> dict[str, Any]:
    """lm-eval's {"tasks", "groups", "group_map"} of each task, group or tag, with its data.

    Raises:
        InputError: no data for some; all of them are named.
    """
    loaded, missing = {}, []
    with offline_data(offline_root), _quiet():
        for name in names:
            try:
                loaded[name] = manager.load([name])
            except ConnectionError as error:
                if offline_root is None:  # every other task would wait through the same retries
                    text = f"tasks: no data for {name!r}: the Hub cannot be reached ({_reason(error)})"
                    raise InputError(f"{text}; where there is no network, name a data tree as offline root") from None
                missing.append(f"{name} ({_reason(error)})")
            except (OSError, ValueError) as error:
                # datasets raises OSError or ValueError kinds for absent data and absent configurations.
                missing.append(f"{name} ({_reason(error)})")
    if missing:
        raise InputError(f"tasks: no data at {offline_root or 'the Hub'} for {', '.join(missing)}")
    return loaded


def _reason(error: Exception) -> str:
    """The data set that a loading error names, or the error's first line."""
    text = str(error).strip()
    found = re.search(r"'([\w.-]+/[\w.-]+)'", text)
    return found[1] if found else text.splitlines()[0] if text else type(error).__name__


def _harness(model: Any, tokenizer: Any, batch_size: int, max_length: int) -> Any:
    """lm-eval's wrapper of a loaded model, with a counter of prompts that were cut."""
    from lm_eval.models.huggingface import HFLM

    class CountingHFLM(HFLM):
        truncated = 0

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            self.truncated += sum(len(context) + len(target) > self.max_length + 1 for _, context, target in requests)
            return super()._loglikelihood_tokens(requests, *args, **kwargs)

        def tok_batch_encode(self, strings: Any, *args: Any, left_truncate_len: Any = None, **kwargs: Any) -> Any:
            if left_truncate_len:
                self.truncated += sum(len(self.tok_encode(text)) > left_truncate_len for text in strings)
            return super().tok_batch_encode(strings, *args, left_truncate_len=left_truncate_len, **kwargs)

    with _quiet():
        return CountingHFLM(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            softmax_dtype="float32",
            max_length=max_length,
            batch_size=batch_size,
            trust_remote_code=False,
        )


def _run_one(harness: Any, spec: TaskSpec, loaded: Any, *, limit: int | None, seed: int) -> dict[str, Any]:
    """{"results": {name: TaskResult as a dict}, "rows": [...]} of one task, group or tag."""
    from lm_eval.evaluator import evaluate

    start = time.perf_counter()
    harness.truncated = 0
    _seed_all(seed)
    with _quiet():
        for task in loaded["tasks"].values():
            shots = spec.shots if spec.shots is not None else task.get_config("num_fewshot")
            task.set_config(key="num_fewshot", value=shots or 0)
            task.set_fewshot_seed(seed=seed)
            if spec.generation and task.get_config("output_type") == "generate_until":
                task.set_config(key="generation_kwargs", value=dict(spec.generation), update=True)
        with context_length(harness.tokenizer, harness.max_length):
            output = evaluate(harness, loaded, limit=limit, bootstrap_iters=1000)
    seconds = time.perf_counter() - start
    names = [spec.task] if spec.task in output["results"] else list(output["samples"])
    results, rows = {}, []
    for name in names:
        samples = samples_of(name, output)
        result = task_result(
            name,
            output,
            samples,
            spec,
            limit=limit,
            max_length=harness.max_length,
            truncated=harness.truncated,
            seconds=seconds,
        )
        results[name] = result.model_dump()
        rows += sample_rows(name, samples)
    return {"results": results, "rows": rows}


def _seed_all(seed: int) -> None:
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _fingerprint(model: Any) -> str:
    """Changes when the configuration or any weight does (fp64 sums by name), without hashing gigabytes."""
    import torch

    # Not the weights alone: two windows of softmax attention over the same teacher differ only here.
    digest = hashlib.sha256(model.config.to_json_string().encode())
    for name, parameter in model.named_parameters():
        total = parameter.detach().sum(dtype=torch.float64).item()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {total!r}\n".encode())
    return digest.hexdigest()


@contextmanager
def _quiet() -> Any:
    """lm-eval warns once per truncated prompt and per default it fills in; we count the one and record the other. The
    Hub's client warns of every attempt to connect; what comes of them is told. `datasets` draws a bar per file."""
    import datasets

    loggers = [logging.getLogger(name) for name in ("lm_eval", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    bars = datasets.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
