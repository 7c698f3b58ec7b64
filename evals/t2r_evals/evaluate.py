"""One model in, one `ModelResult` out."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field

from t2r_evals import harness, language
from t2r_evals.components import measure_components
from t2r_evals.errors import InputError
from t2r_evals.schema import ComponentResult, ModelResult, RecallPoint, Record, Role, TaskResult
from t2r_evals.speed import measure_speed
from t2r_evals.suites import resolve_tasks
from t2r_evals.synthetic import make_items, run_synthetic


class EvaluationOptions(Record):
    """What to measure, and how. The same options for teacher, student and controls: only then do they pair.

    Args:
        suites: names from `t2r_evals.suites.SUITES`; "language" needs `documents`.
        tasks: lm-eval task names, after those of the suites.
        shots: examples in the prompt; None = the suite's or the task's own number.
        limit: first N documents of each task; None = all.
        windows, window: running text: the first `windows` windows of `window` tokens; None = all full windows.
        batch_size: sequences at a time; never changes a result beyond rounding.
        max_length: context in tokens for tasks; longer prompts are cut on the left, and counted.
        offline_root: folder that stands in for the Hub's data sets; None = the Hub.
        tasks_root: folder with further task definitions. They may run code: only pass what you trust.
        recall_lengths, recall_items: tokens per text, and items per length and depth, of the suite "synthetic".
        contexts: prompt lengths at which speed is measured; none by default.
        largest_batch: on a GPU, speed also at the largest batch up to this that fits.
        far_repeat_gap, far_repeat_min_id: see `language.far_repeats`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    suites: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    shots: int | None = Field(None, ge=0)
    limit: int | None = Field(None, ge=1)
    windows: int | None = Field(48, ge=1)
    window: int = Field(2048, ge=2)
    batch_size: int = Field(8, ge=1)
    max_length: int = Field(2048, ge=2)
    offline_root: Path | None = None
    tasks_root: Path | None = None
    recall_lengths: tuple[int, ...] = (512, 1024, 2048)
    recall_items: int = Field(10, ge=1)
    contexts: tuple[int, ...] = ()
    largest_batch: int = Field(1, ge=1)
    far_repeat_gap: int = Field(128, ge=1)
    far_repeat_min_id: int = Field(300, ge=0)
    seed: int = 0


def check_text(tokenizer: Any, documents: Sequence[str] | None, options: EvaluationOptions) -> None:
    """Whether text and lengths suffice, before a model is loaded or trained.

    Raises:
        InputError: fewer windows of text than the options ask for, or a length without room for a look-up.
    """
    if documents is not None:
        language.scored_stream(tokenizer, documents, windows=options.windows, window=options.window)
    if "synthetic" in options.suites:
        make_items(tokenizer, min(options.recall_lengths), 1, options.seed)


def evaluate(
    model: Any,
    tokenizer: Any,
    *,
    name: str,
    role: Role,
    documents: Sequence[str] | None,
    options: EvaluationOptions,
    state_bytes: int | None = None,
    kv_bytes_per_token: int | None = None,
    teacher: Any = None,
    components: Mapping[str, Sequence[Any]] | None = None,
    folder: Path | None = None,
) -> ModelResult:
    """Measure one model.

    Args:
        model, tokenizer: a causal language model of transformers on its device, and its tokenizer.
        name: how tables call it. Unique within a report.
        role: teacher, student or control.
        documents: texts for the language measurements; None leaves them out.
        options: what to measure.
        state_bytes, kv_bytes_per_token: memory of the model's cache, from whoever knows the model.
        teacher: second model on the same device; adds KL(teacher || model) and top-1 agreement per token.
        components: of a hybrid, modules by component (say, its attention modules by mixer); each is switched off in
            turn while the documents are read again.
        folder: where each finished task is kept, so that an interrupted evaluation continues task by task.

    Raises:
        InputError: unknown task, too little text, a data tree that lacks a task's data.
    """
    specs = resolve_tasks(options.suites, options.tasks, options.shots)
    if "language" in options.suites and documents is None:
        raise InputError("suites: 'language' needs documents to read; name a text file")
    was_training = model.training
    model.eval()
    try:
        tasks: dict[str, TaskResult] = {}
        samples: list[dict[str, Any]] = []
        if specs:  # first: what lacks its data is told before anything is measured
            tasks, samples = harness.run_tasks(
                model,
                tokenizer,
                specs,
                limit=options.limit,
                batch_size=options.batch_size,
                max_length=options.max_length,
                offline_root=options.offline_root,
                tasks_root=options.tasks_root,
                seed=options.seed,
                folder=folder,
            )
        spoken = None
        parts: list[ComponentResult] = []
        if documents is not None:
            read = partial(
                language.measure,
                model,
                tokenizer,
                documents,
                windows=options.windows,
                window=options.window,
                batch_size=options.batch_size,
                far_repeat_gap=options.far_repeat_gap,
                far_repeat_min_id=options.far_repeat_min_id,
            )
            spoken = read(teacher=teacher)
            parts = measure_components(components or {}, spoken, read)
        recall: list[RecallPoint] = []
        if "synthetic" in options.suites:
            found, recall, rows = run_synthetic(
                model,
                tokenizer,
                lengths=options.recall_lengths,
                items=options.recall_items,
                batch_size=options.batch_size,
                seed=options.seed,
            )
            tasks, samples = tasks | found, samples + rows
        points = list(measure_speed(model, options.contexts, largest_batch=options.largest_batch, seed=options.seed))
    finally:
        model.train(was_training)
    return ModelResult(
        name=name,
        role=role,
        parameters=sum(p.numel() for p in model.parameters()),
        state_bytes=state_bytes,
        kv_bytes_per_token=kv_bytes_per_token,
        dtype=str(model.dtype).removeprefix("torch."),
        language=spoken,
        tasks=tasks,
        speed=points,
        components=parts,
        recall=recall,
        samples=samples,
    )
