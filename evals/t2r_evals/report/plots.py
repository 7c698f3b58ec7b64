"""The figures of a report, as SVG text by name; pure functions of `Report`."""

from dataclasses import dataclass

from t2r_evals.report import facts
from t2r_evals.report import formats as f
from t2r_evals.report.svg import Bar, Series, bar_chart, downsample, heat_map, line_chart
from t2r_evals.schema import Report, Stage


@dataclass(frozen=True)
class Figure:
    """`section` says where it belongs: verdict, tasks, recall, position, speed or training."""

    name: str
    section: str
    caption: str
    svg: str


def figures(report: Report) -> list[Figure]:
    """Every figure that the report has data for."""
    found = [_excess_bars(report), _memory(report), _task_differences(report), *_positions(report)]
    found += [*_recall(report), *_speed(report)]
    found.append(None if report.runs else _validation(report))
    found += [_training(report, stage, index) for index, stage in enumerate(report.stages)]
    return [figure for figure in found if figure is not None]


def _excess_bars(report: Report) -> Figure | None:
    color = facts.colors(report)
    bars = []
    for result in report.results:
        distance = facts.excess(report, result)
        if distance is not None:
            bars.append(Bar(result.name, distance, color[result.name]))
    if not bars:
        return None
    caption = "Loss above the teacher on held-out text (lower is better)"
    svg = bar_chart(bars, title=caption, x_label="nats per token above the teacher", value_format=lambda v: f"{v:.3f}")
    return Figure("loss-above-teacher", "verdict", caption, svg)


def _memory(report: Report) -> Figure | None:
    shown = [r for r in report.results if r.role != "control" and (r.state_bytes or r.kv_bytes_per_token)]
    if not shown:
        return None
    color = facts.colors(report)
    lengths = [2**e for e in range(7, 18)]
    series = [
        Series(r.name, lengths, [facts.memory_at(r, n) for n in lengths], color[r.name], r.role == "teacher")
        for r in shown
    ]
    caption = "Memory that one sequence keeps, by its length"
    svg = line_chart(
        series,
        title=caption,
        x_label="context, tokens (log scale)",
        y_label="bytes per sequence (log scale)",
        x_log=True,
        y_log=True,
        y_base=2,
        x_format=f.tokens_axis,
        y_format=f.size,
    )
    return Figure("memory-by-length", "verdict", caption, svg)


def _positions(report: Report) -> list[Figure]:
    read = [r for r in report.results if r.language is not None]
    if not read:
        return []
    color = facts.colors(report)
    made = []
    series = []
    for r in read:
        assert r.language is not None
        buckets = r.language.loss_by_position
        series.append(
            Series(r.name, [b.end for b in buckets], [b.loss for b in buckets], color[r.name], r.role == "teacher")
        )
    caption = "Loss by position in the window"
    made.append(Figure("loss-by-position", "position", caption, _position_chart(series, caption, "nats per token")))
    series = []
    for r in read:
        teacher = facts.teacher_of(report, r)
        if facts.excess(report, r) is None or teacher is None or teacher.language is None or r.language is None:
            continue
        pairs = list(zip(r.language.loss_by_position, teacher.language.loss_by_position, strict=True))
        series.append(Series(r.name, [a.end for a, _ in pairs], [a.loss - b.loss for a, b in pairs], color[r.name]))
    if series:
        caption = "Loss above the teacher by position"
        svg = _position_chart(series, caption, "nats above the teacher", from_zero=True)
        made.append(Figure("excess-by-position", "position", caption, svg))
    return made


def _position_chart(series: list[Series], title: str, y_label: str, *, from_zero: bool = False) -> str:
    return line_chart(
        series,
        title=title,
        x_label="position up to, tokens (log scale)",
        y_label=y_label,
        x_log=True,
        x_format=f.tokens_axis,
        y_format=lambda v: f"{v:.2f}",
        from_zero=from_zero,
    )


def _task_differences(report: Report) -> Figure | None:
    teachers = {result.name for result in report.by_role("teacher")}
    pairs = [c for c in report.comparisons or [] if c.mcnemar_p is not None and c.baseline in teachers]
    if not pairs:
        return None
    color = facts.colors(report)
    several = len({c.model for c in pairs}) > 1
    bars = [
        Bar(
            f"{c.measurement}, {c.model}" if several else c.measurement,
            100 * c.difference,
            color.get(c.model, 1),
            100 * c.low,
            100 * c.high,
        )
        for c in pairs
    ]
    caption = "Accuracy minus the teacher's, with the 95% interval of the paired difference"
    svg = bar_chart(bars, title=caption, x_label="points of accuracy", value_format=lambda v: f"{v:.1f}")
    return Figure("task-differences", "tasks", caption, svg)


def _recall(report: Report) -> list[Figure]:
    """Accuracy by length and depth, a map per task and model; controls stay out, the tables have them."""
    made: list[Figure] = []
    shown = [r for r in report.results if r.recall and r.role != "control"]
    for task in dict.fromkeys(p.task for r in shown for p in r.recall):
        for r in shown:
            cells = {(p.depth, p.length): p.accuracy for p in r.recall if p.task == task}
            depths = sorted({depth for depth, _ in cells})
            lengths = sorted({length for _, length in cells})
            caption = f"{task}, {r.name}: accuracy by length" + (" and depth" if len(depths) > 1 else "")
            svg = heat_map(
                [[cells.get((depth, length)) for length in lengths] for depth in depths],
                title=caption,
                columns=[f.tokens_axis(length) for length in lengths],
                rows=[f"{100 * depth:.0f}%" if len(depths) > 1 else "all" for depth in depths],
                x_label="length, tokens",
                y_label="depth",
            )
            made.append(Figure(f"recall-{task}-{len(made)}", "recall", caption, svg))
    return made


def _speed(report: Report) -> list[Figure]:
    color = facts.colors(report)
    measured = [r for r in report.results if r.speed]
    made = []
    kinds = (
        ("prefill", "Prefill speed by context length", "tokens per second", "prefill_tokens_per_second"),
        ("decode", "Decoding speed by context length", "tokens per second", "decode_tokens_per_second"),
    )
    for name, caption, y_label, field in kinds:
        series = []
        for r in measured:
            for batch in sorted({p.batch for p in r.speed}):
                points = [p for p in r.speed if p.batch == batch]
                label = r.name if batch == 1 else f"{r.name}, batch {batch}"
                values = [getattr(p, field) for p in points]
                series.append(Series(label, [p.context for p in points], values, color[r.name], batch > 1))
        if series:
            svg = line_chart(
                series,
                title=caption,
                x_label="context, tokens (log scale)",
                y_label=y_label,
                x_log=True,
                x_format=f.tokens_axis,
                y_format=f.short_count,
                from_zero=True,
            )
            made.append(Figure(name, "speed", caption, svg))
    return made


def _training(report: Report, stage: Stage, index: int) -> Figure | None:
    logged = [(p.tokens, p.loss) for p in stage.curve if p.loss is not None]
    if not logged:
        return None
    x, y = downsample([x for x, _ in logged], [y for _, y in logged])
    wide = min(y) > 0 and max(y) > 20 * min(y)
    caption = f"Stage {stage.name}: {stage.loss_name} by training tokens"
    svg = line_chart(
        [Series(stage.loss_name, x, y, 1, points=len(x) <= 40)],
        title=caption,
        x_label="training tokens",
        y_label="loss" + (" (log scale)" if wide else ""),
        y_log=wide,
        x_format=f.short_count,
        y_format=lambda v: f"{v:.3g}",
    )
    return Figure(f"training-{index + 1}-{stage.kind}", "training", caption, svg)


def _validation(report: Report) -> Figure | None:
    """Held-out loss over all stages, a line per stage, on the tokens of the whole training."""
    series, before = [], 0
    for index, stage in enumerate(report.stages):
        points = [(before + p.tokens, p.validation_loss) for p in stage.curve if p.validation_loss is not None]
        if points:
            series.append(Series(stage.name, [x for x, _ in points], [y for _, y in points], 1 + index % 7))
        before += stage.tokens
    if all(len(s.x) < 2 for s in series):
        return None  # The table of stages has the one number.
    caption = "Validation loss during training"
    svg = line_chart(
        series,
        title=caption,
        x_label="training tokens, all stages",
        y_label="nats per token",
        x_format=f.short_count,
        y_format=lambda v: f"{v:.2f}",
    )
    return Figure("validation-loss", "training", caption, svg)
