"""The tables of a report, before anyone decides how they look."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from t2r_evals.report import facts
from t2r_evals.report import formats as f
from t2r_evals.schema import Comparison, ModelResult, Report, Role

_MAIN: tuple[Role, Role] = ("student", "teacher")


@dataclass(frozen=True)
class Cell:
    """Text, and what it sorts by (None sorts last)."""

    text: str
    key: float | str | None = None


@dataclass(frozen=True)
class Table:
    """`numeric` columns align right; `note` explains what the columns need."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    numeric: Sequence[bool] = field(default=())

    def is_numeric(self, column: int) -> bool:
        return self.numeric[column] if self.numeric else column > 0


def component_table(report: Report) -> Table | None:
    """Hybrids with each component switched off in turn."""
    rows = [
        [
            Cell(r.name, r.name),
            Cell(f"{c.component} ({f.plural(c.modules, 'module')})", c.component),
            Cell(f.loss(c.loss), c.loss),
            Cell(f.signed(c.difference), c.difference),
            Cell(f"{c.low:+.3f} to {c.high:+.3f}", c.low),
            Cell(f.loss(c.far_repeat_loss), c.far_repeat_loss),
        ]
        for r in report.results
        for c in r.components
    ]
    columns = ["model", "switched off", "loss without", "rise", "95% interval", "far-repeat loss without"]
    note = "The component's output set to zero; the same windows of text, paired."
    return Table(columns, rows, note, [False, False, True, True, True, True]) if rows else None


def language_table(report: Report) -> Table | None:
    """One row per model: loss, excess over the teacher, perplexity, bits per byte, far repeats, KL."""
    read = [r for r in report.results if r.language is not None]
    if not read:
        return None
    with_kl = any(r.language and r.language.kl_to_teacher is not None for r in read)
    columns = ["model", "loss", "above teacher", "perplexity", "bits/byte", "far-repeat loss", "above teacher (far)"]
    rows = []
    for result in read:
        spoken = result.language
        assert spoken is not None
        teacher, distance = facts.teacher_of(report, result), facts.excess(report, result)
        far = None
        if distance is not None and teacher and teacher.language and spoken.far_repeat_loss is not None:
            far_teacher = teacher.language.far_repeat_loss
            far = None if far_teacher is None else spoken.far_repeat_loss - far_teacher
        row = [
            _name(result),
            Cell(f.loss(spoken.loss), spoken.loss),
            Cell(f.signed(distance), distance),
            Cell(f"{spoken.perplexity:.4g}", spoken.perplexity),
            Cell(f.loss(spoken.bits_per_byte), spoken.bits_per_byte),
            Cell(f.loss(spoken.far_repeat_loss), spoken.far_repeat_loss),
            Cell(f.signed(far), far),
        ]
        if with_kl:
            row += [
                Cell(f.loss(spoken.kl_to_teacher), spoken.kl_to_teacher),
                Cell(f.percent(spoken.top1_agreement), spoken.top1_agreement),
            ]
        rows.append(row)
    first = read[0].language
    assert first is not None
    note = (
        f"Nats per token on {first.tokens:,} tokens ({first.windows} windows of {first.window:,}; "
        f"{first.bytes:,} bytes). Far repeats: {first.far_repeat_tokens:,} positions whose bigram last occurred more "
        f"than {first.far_repeat_gap} tokens earlier in the window (target id above {first.far_repeat_min_id})."
    )
    if len({r.language.data_sha256 for r in read if r.language}) > 1:
        note += " Not all models read this text: only losses on the same text compare."
    if with_kl:
        columns += ["KL to teacher", "same top token, %"]
    return Table(columns, rows, note)


def size_table(report: Report) -> Table | None:
    """Parameters and memory per sequence."""
    if not any(r.state_bytes or r.kv_bytes_per_token for r in report.results):
        return None
    rows = []
    for r in report.results:
        rows.append(
            [
                _name(r),
                Cell(f.count(r.parameters), r.parameters),
                Cell(f.size(r.state_bytes or None), r.state_bytes),
                Cell(f.size(r.kv_bytes_per_token or None), r.kv_bytes_per_token),
                *[Cell(f.size(facts.memory_at(r, n)), facts.memory_at(r, n)) for n in (2048, 32768, 131072)],
            ]
        )
    columns = ["model", "parameters", "state", "KV cache per token", "at 2K tokens", "at 32K", "at 128K"]
    return Table(columns, rows, "Memory of one sequence beside the weights.")


def task_table(report: Report) -> Table | None:
    """One row per task; per model its score with standard error, and the share of the teacher's gain over chance."""
    tasks = list(dict.fromkeys(name for r in report.results for name in r.tasks))
    if not tasks:
        return None
    models = [r for r in report.results if r.tasks]
    students = [r for r in models if r.role == "student" and any(facts.comparison_of(report, r, t) for t in tasks)]
    columns = ["task", "metric", "shots", "documents", "chance", *[r.name for r in models]]
    columns += [f"recovered, {r.name}" if len(students) > 1 else "recovered, %" for r in students]
    rows = []
    for task in tasks:
        first = next(r.tasks[task] for r in models if task in r.tasks)
        row = [
            Cell(task, task),
            Cell(first.primary, first.primary),
            Cell(str(first.shots), first.shots),
            Cell(f"{first.documents:,}" + (" (limited)" if first.limit else ""), first.documents),
            Cell(f.percent(first.chance) if first.chance else f.BLANK, first.chance),
        ]
        row += [_score(r, task) for r in models]
        for r in students:
            pair = facts.comparison_of(report, r, task)
            value = pair.recovered if pair else None
            row.append(Cell(f.percent(value), value))
        rows.append(row)
    averaged = facts.averaged_tasks(report)
    if len(averaged) > 1:
        rows.append(_average_row(report, models, students, averaged))
    numeric = [False, False] + [True] * (len(columns) - 2)
    cut = sum(t.truncated for r in models for t in r.tasks.values())
    contexts = sorted({t.max_length for r in models for t in r.tasks.values()})
    note = (
        "Accuracies in % ± standard error. Recovered = (model - chance) / (teacher - chance), blank where the teacher "
        f"is within two standard errors of chance. Context {', '.join(f'{c:,}' for c in contexts)} tokens; "
        f"{cut:,} prompts were cut on the left to fit."
    )
    return Table(columns, rows, note, numeric)


def _average_row(
    report: Report, models: Sequence[ModelResult], students: Sequence[ModelResult], tasks: list[str]
) -> list[Cell]:
    chance = sum(models[0].tasks[name].chance for name in tasks) / len(tasks)
    row = [Cell(f"average of {len(tasks)}"), Cell(f.BLANK), Cell(f.BLANK), Cell(f.BLANK), Cell(f.percent(chance))]
    row += [Cell(f.percent(facts.task_average(r, tasks))) for r in models]
    return row + [Cell(f.percent(facts.average_recovered(report, r, tasks))) for r in students]


def _score(result: ModelResult, task: str) -> Cell:
    if task not in result.tasks:
        return Cell(f.BLANK)
    metric = result.tasks[task].metrics[result.tasks[task].primary]
    if not metric.higher_is_better or metric.value > 1:
        return Cell(f"{metric.value:.4g}", metric.value)
    stderr = "" if metric.stderr is None else f" ± {100 * metric.stderr:.1f}"
    return Cell(f.percent(metric.value) + stderr, metric.value)


def comparison_table(report: Report) -> Table | None:
    """The students against the teacher, item by item."""
    return _comparisons(report, _split(report)[0])


def control_comparison_table(report: Report) -> Table | None:
    """Every other paired comparison: the controls against the teacher, the students against the controls."""
    return _comparisons(report, _split(report)[1])


def _split(report: Report) -> tuple[list[Comparison], list[Comparison]]:
    students, teachers = ({result.name for result in report.by_role(role)} for role in _MAIN)
    found = report.comparisons or []
    main = [c for c in found if c.model in students and c.baseline in teachers]
    return main, [c for c in found if c not in main]


def _comparisons(report: Report, comparisons: list[Comparison]) -> Table | None:
    if not comparisons:
        return None
    teachers = {result.name for result in report.by_role("teacher")}
    rows = []
    for c in comparisons:
        is_share = c.measurement != "language" and 0 <= c.baseline_value <= 1 and 0 <= c.model_value <= 1
        scale, show = (100.0, "{:+.1f}") if is_share else (1.0, "{:+.3f}")
        interval = Cell(f.BLANK)
        if c.items > 1:
            interval = Cell(f"{show.format(scale * c.low)} to {show.format(scale * c.high)}", c.low)
        recovered = c.recovered if c.baseline in teachers else None
        rows.append(
            [
                Cell(c.measurement, c.measurement),
                Cell(c.model, c.model),
                Cell(c.baseline, c.baseline),
                Cell(f"{c.items:,}", c.items),
                Cell(show.format(scale * c.difference), c.difference),
                interval,
                Cell(f"{c.wins:,}", c.wins),
                Cell(f"{c.losses:,}", c.losses),
                Cell(f"{c.ties:,}", c.ties),
                Cell(f.percent((c.wins + c.ties) / c.items), (c.wins + c.ties) / c.items),
                Cell(f.p_value(c.mcnemar_p), c.mcnemar_p),
                Cell(f.percent(recovered), recovered),
            ]
        )
    columns = ["measurement", "model", "against", "items", "difference", "95% interval", "better", "worse", "same"]
    columns += ["as good, %", "McNemar p", "recovered, %"]
    note = (
        "Model minus the one it is compared with, on the same items: windows of text (nats) or documents (points of "
        "accuracy); Student t interval of the paired difference; as good: wins and ties; exact two-sided McNemar p for "
        "right/wrong answers."
    )
    return Table(columns, rows, note, [False] * 3 + [True] * 9)


def speed_table(report: Report) -> Table | None:
    points = [(r, p) for r in report.results for p in r.speed]
    if not points:
        return None
    rows = [
        [
            _name(r),
            Cell(f"{p.context:,}", p.context),
            Cell(str(p.batch), p.batch),
            Cell(f.count(p.prefill_tokens_per_second), p.prefill_tokens_per_second),
            Cell(f.count(p.decode_tokens_per_second), p.decode_tokens_per_second),
            Cell(f.duration_ms(p.first_token_seconds), p.first_token_seconds),
            Cell(f.size(p.peak_bytes), p.peak_bytes),
            Cell(f.size(p.state_bytes), p.state_bytes),
        ]
        for r, p in points
    ]
    columns = [
        "model",
        "context",
        "batch",
        "prefill, tokens/s",
        "decode, tokens/s",
        "first token",
        "peak memory",
        "cache",
    ]
    return Table(columns, rows, "Rates over the whole batch; peak memory beyond the weights; cache of the whole batch.")


def stage_table(report: Report) -> Table | None:
    if not report.stages:
        return None
    rows = []
    for s in report.stages:
        last = next((p.validation_loss for p in reversed(s.curve) if p.validation_loss is not None), None)
        rows.append(
            [
                Cell(s.name, s.name),
                Cell(s.kind, s.kind),
                Cell(f.count(s.tokens), s.tokens),
                Cell(f"{s.steps:,}", s.steps),
                Cell(f.duration(s.seconds), s.seconds),
                Cell(f.count(s.tokens_per_second), s.tokens_per_second),
                Cell(f.loss(last), last),
                Cell(s.device or f.BLANK, s.device),
            ]
        )
    columns = ["stage", "kind", "tokens", "steps", "time", "tokens/s", "last validation loss", "device"]
    return Table(columns, rows, "", [False, False, True, True, True, True, True, False])


def run_table(report: Report) -> Table | None:
    """The runs that a comparison puts side by side."""
    if not report.runs:
        return None
    rows = [
        [
            Cell(r.label, r.label),
            Cell(r.source or f.BLANK, r.source),
            Cell(r.mixer or f.BLANK, r.mixer),
            Cell(f.count(r.tokens), r.tokens),
            Cell(f.duration(r.seconds), r.seconds),
            Cell(r.created, r.created),
        ]
        for r in report.runs
    ]
    columns = ["run", "source", "mixer", "training tokens", "training time", "created"]
    return Table(columns, rows, "", [False, False, False, True, True, False])


def _name(result: ModelResult) -> Cell:
    return Cell(result.name if result.name == result.role else f"{result.name} ({result.role})", result.name)
