"""What a model card says of an evaluation: Hugging Face's `model-index`, and a short table."""

from typing import Any

from t2r_evals.report import facts
from t2r_evals.report import formats as f
from t2r_evals.schema import ModelResult, Report


def model_index(report: Report, model_name: str) -> list[dict[str, Any]]:
    """The value of `model-index` in a model card's front matter: the first student's scores as `EvalResult`s.

    Raises:
        ValueError: the report has no student.
    """
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    student = _student(report)
    found = []
    if student.language is not None:
        for kind, value in (("loss", student.language.loss), ("perplexity", student.language.perplexity)):
            found.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type="held-out-text",
                    dataset_name=f"held-out text, {student.language.tokens:,} tokens",
                    metric_type=kind,
                    metric_value=round(value, 4),
                )
            )
    for name, task in student.tasks.items():
        metric = task.metrics[task.primary]
        found.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=name,
                dataset_name=f"{name} ({task.shots}-shot)",
                metric_type=task.primary.split(",")[0],
                metric_value=round(metric.value, 4),
                metric_args={"version": task.version, "documents": task.documents},
            )
        )
    return eval_results_to_model_index(model_name, found)


def card_table(report: Report) -> str:
    """Student beside teacher, in Markdown; the report has the rest.

    Raises:
        ValueError: the report has no student.
    """
    student = _student(report)
    teacher = facts.teacher_of(report, student)
    rows = []
    if student.language is not None:
        other = teacher.language.loss if teacher and teacher.language else None
        rows.append(("loss on held-out text, nats per token", f.loss(student.language.loss), f.loss(other)))
    for name, task in student.tasks.items():
        metric = task.metrics[task.primary]
        other = teacher.tasks[name].metrics[task.primary].value if teacher and name in teacher.tasks else None
        show = f.percent if metric.higher_is_better and metric.value <= 1 else f.loss
        rows.append((f"{name}, {task.primary}, {task.shots}-shot", show(metric.value), show(other)))
    lines = ["| measurement | student | teacher |", "|---|---:|---:|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows]) + "\n"


def _student(report: Report) -> ModelResult:
    student = next(iter(report.by_role("student")), None)
    if student is None:
        raise ValueError("a model card is about a student; the report has none")
    return student
