"""What follows from a report's numbers, and more than one part of it needs."""

from t2r_evals.schema import Comparison, ModelResult, Report, Role


def teacher_of(report: Report, model: ModelResult | None = None) -> ModelResult | None:
    """The teacher that `model` was compared with: runs side by side may have one each. Otherwise the first."""
    teachers = {result.name: result for result in report.by_role("teacher")}
    named = [c.baseline for c in report.comparisons or [] if model is not None and c.model == model.name]
    return next((teachers[name] for name in [*named, *teachers] if name in teachers), None)


def colors(report: Report) -> dict[str, int]:
    """Chart colour by model name: the first teacher 0, then students, controls and further teachers 1..7."""
    teacher = teacher_of(report)
    roles: tuple[Role, ...] = ("student", "control", "teacher")
    rest = [r for role in roles for r in report.by_role(role) if r is not teacher]
    return ({teacher.name: 0} if teacher else {}) | {r.name: 1 + i % 7 for i, r in enumerate(rest)}


def comparison_of(
    report: Report, model: ModelResult, measurement: str, baseline: ModelResult | None = None
) -> Comparison | None:
    """The paired comparison of `model` with `baseline`, or with the teacher of its run."""
    teachers = {result.name for result in report.by_role("teacher")}
    for c in report.comparisons or []:
        against = c.baseline in teachers if baseline is None else c.baseline == baseline.name
        if against and c.model == model.name and c.measurement == measurement:
            return c
    return None


def averaged_tasks(report: Report) -> list[str]:
    """Tasks that every model with tasks has, with a primary metric that is a share: what an average is taken over. The
    made-up look-up tasks stay out; length and depth decide what they give."""
    models = [r for r in report.results if r.tasks]
    made_up = {point.task for r in models for point in r.recall}
    names = [name for name in (models[0].tasks if models else []) if name not in made_up]
    shared = [name for name in names if all(name in r.tasks for r in models)]
    metrics = {name: [r.tasks[name].metrics[r.tasks[name].primary] for r in models] for name in shared}
    return [name for name in shared if all(m.higher_is_better and m.value <= 1 for m in metrics[name])]


def task_average(result: ModelResult, tasks: list[str]) -> float:
    """Mean of the primary metrics."""
    return sum(result.tasks[name].metrics[result.tasks[name].primary].value for name in tasks) / len(tasks)


def average_recovered(report: Report, model: ModelResult, tasks: list[str]) -> float | None:
    """Of the teacher's average above chance, the model's share; None where a task's own share would be noise."""
    teacher = teacher_of(report, model)
    pairs = [comparison_of(report, model, name) for name in tasks]
    if teacher is None or not pairs or any(pair is None or pair.recovered is None for pair in pairs):
        return None
    chance = sum(result.chance for name, result in teacher.tasks.items() if name in tasks) / len(tasks)
    return (task_average(model, tasks) - chance) / (task_average(teacher, tasks) - chance)


def excess(report: Report, model: ModelResult) -> float | None:
    """Loss above the teacher's in nats per token; None unless both read the same tokens."""
    teacher = teacher_of(report, model)
    if teacher is None or model.language is None or teacher.language is None or model is teacher:
        return None
    if model.language.data_sha256 != teacher.language.data_sha256:
        return None
    return model.language.loss - teacher.language.loss


def trained_tokens(report: Report) -> int:
    return sum(stage.tokens for stage in report.stages)


def training_seconds(report: Report) -> float:
    return sum(stage.seconds for stage in report.stages)


def crossover(student: ModelResult, teacher: ModelResult | None) -> int | None:
    """First context length at which the teacher's KV cache is larger than the student's state and cache."""
    if teacher is None or not student.state_bytes or not teacher.kv_bytes_per_token:
        return None
    growth = teacher.kv_bytes_per_token - (student.kv_bytes_per_token or 0)
    return student.state_bytes // growth + 1 if growth > 0 else None


def memory_at(result: ModelResult, tokens: int) -> int:
    """Bytes that a sequence of `tokens` keeps."""
    return (result.state_bytes or 0) + (result.kv_bytes_per_token or 0) * tokens
