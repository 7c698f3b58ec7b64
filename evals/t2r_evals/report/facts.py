"""What follows from a report's numbers, and more than one part of it needs."""

from t2r_evals.schema import Comparison, ModelResult, Report, Role


def teacher_of(report: Report) -> ModelResult | None:
    return next(iter(report.by_role("teacher")), None)


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


def excess(model: ModelResult, teacher: ModelResult | None) -> float | None:
    """Loss above the teacher's in nats per token; None unless both read the same tokens."""
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
