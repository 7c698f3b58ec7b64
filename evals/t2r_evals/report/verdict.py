"""The findings of a report in sentences, the most important first."""

from t2r_evals.report import facts
from t2r_evals.report import formats as f
from t2r_evals.schema import ModelResult, Report

UNTRAINED = "no training"  # how a run calls the converted model before any training


def verdict(report: Report) -> list[str]:
    """The findings in sentences, the most important first."""
    said = []
    students = report.by_role("student")
    if report.conversion is not None:
        said.append(_conversion_sentence(report, facts.teacher_of(report)))
    for student in students:
        teacher, distance = facts.teacher_of(report, student), facts.excess(report, student)
        if distance is None or student.language is None or teacher is None or teacher.language is None:
            continue
        pair = facts.comparison_of(report, student, "language")
        interval = f" (95% interval {pair.low:+.3f} to {pair.high:+.3f})" if pair and pair.items > 1 else ""
        cost = ""
        if report.stages and len(students) == 1:
            tokens, seconds = facts.trained_tokens(report), facts.training_seconds(report)
            cost = f"After {f.count(tokens)} training tokens in {f.duration(seconds)}, "
        said.append(
            f"{cost}{_subject(student, bool(cost))} reads held-out text at {student.language.loss:.3f} nats per token, "
            f"{_away(distance)} the teacher's {teacher.language.loss:.3f}{interval}."
        )
        said += _control_sentences(report, student, distance)
    for student in students:
        said += _task_sentences(report, student, facts.teacher_of(report, student))
    for student in students[:1]:
        teacher = facts.teacher_of(report, student)
        cross = facts.crossover(student, teacher)
        if cross is not None and student.state_bytes is not None:
            grows = student.kv_bytes_per_token
            length = f"and {f.size(grows)} per token, where softmax layers stayed" if grows else "at any length"
            said.append(
                f"{_subject(student)} keeps {f.size(student.state_bytes)} of state per sequence {length}; "
                f"the teacher's KV cache is larger from {cross:,} tokens on."
            )
        said += idle_components(student)
        if teacher is not None:
            said += _speed_sentences(student, teacher)
    return said


def _task_sentences(report: Report, student: ModelResult, teacher: ModelResult | None) -> list[str]:
    """The average over the tasks beside the teacher's, and where the difference is more than noise."""
    tasks = facts.averaged_tasks(report)
    if teacher is None or not tasks or not student.tasks or not teacher.tasks:
        return []
    mine, other = (facts.task_average(result, tasks) for result in (student, teacher))
    share = facts.average_recovered(report, student, tasks)
    kept = "" if share is None else f": {f.percent(share)}% of what the teacher has above chance"
    over = f"Over {len(tasks)} tasks" if len(tasks) > 1 else f"On {tasks[0]}"
    pairs = {name: facts.comparison_of(report, student, name) for name in tasks}
    clear = [
        f"clearly {word} on {', '.join(names)}"
        for word, names in (
            ("worse", [name for name, pair in pairs.items() if pair and pair.high < 0]),
            ("better", [name for name, pair in pairs.items() if pair and pair.low > 0]),
        )
        if names
    ]
    where = "; ".join(clear) or "no difference is clear of the noise"
    subject = _subject(student, inside=True)
    found = [f"{over} {subject} scores {f.percent(mine)}%, the teacher {f.percent(other)}%{kept}; {where}."]
    start = next((r for r in report.by_role("control") if r.name == UNTRAINED and r.tasks), None)
    won = None if start is None else 100 * (mine - facts.task_average(start, tasks))
    if won is not None and won > 0 and report.stages:
        found.append(f"Training won {won:.1f} points of accuracy{_price(report, won, 'point')}.")
    return found


def idle_components(result: ModelResult) -> list[str]:
    """A sentence per component without which the model reads as well as with it."""
    return [
        f"Warning: without {c.component} the loss changes by {c.difference:+.3f} ({c.low:+.3f} to {c.high:+.3f}): "
        "this path contributes nothing that the text can show."
        for c in result.components
        if c.low <= 0
    ]


def _speed_sentences(student: ModelResult, teacher: ModelResult) -> list[str]:
    """Where the student overtakes the teacher in decoding at batch 1, or that it does not."""
    mine, other = ({p.context: p for p in r.speed if p.batch == 1} for r in (student, teacher))
    shared = sorted(set(mine) & set(other))
    if not shared:
        return []
    ratios = {n: mine[n].decode_tokens_per_second / other[n].decode_tokens_per_second for n in shared}
    ahead = next((n for i, n in enumerate(shared) if all(ratios[m] > 1 for m in shared[i:])), None)
    longest = shared[-1]
    if ahead is None:
        return [f"It decodes slower than the teacher up to {longest:,} tokens of context ({ratios[longest]:.2f} x)."]
    gain = f"{ratios[longest]:.1f} x at {longest:,}"
    return [f"It decodes faster than the teacher from {ahead:,} tokens of context on; {gain}."]


def _conversion_sentence(report: Report, teacher: ModelResult | None) -> str:
    assert report.conversion is not None
    c = report.conversion
    source = report.source or (teacher.name if teacher else "the teacher")
    layers = f" in {c.layers_converted} of {c.layers_total} layers" if c.layers_total else ""
    new = (
        f"; {f.count(c.parameters_new)} of its {f.count(c.parameters_after)} parameters are new"
        if c.parameters_new is not None and c.parameters_after
        else ""
    )
    return f"{source} was converted to {c.mixer}{layers}{new}."


def _control_sentences(report: Report, student: ModelResult, distance: float) -> list[str]:
    controls, said = [], []
    for control in report.by_role("control"):
        pair = facts.comparison_of(report, student, "language", control)
        value = facts.excess(report, control)
        if pair is None or value is None:
            continue
        how = "not clearly better"
        if pair.high < 0 or pair.low > 0:
            how = f"{abs(distance - value):.3f} {'better' if distance < value else 'worse'}"
        controls.append((control, value))
        said.append(f"{how} than {control.name} ({value:+.3f})")
    if not controls:
        return []
    found = [f"Against the controls (loss above the teacher): {', '.join(said)}."]
    found += [
        _closed_gap(report, value, distance)
        for control, value in controls
        if control.name == UNTRAINED and distance < value
    ]
    return found


def _closed_gap(report: Report, start: float, end: float) -> str:
    """What training achieved of what it could, and its price; `start` > `end` above the teacher, in nats."""
    closed = 100 * (start - end) / start
    price = _price(report, closed, "percent") if report.stages else ""
    return f"Training closed {closed:.0f}% of the gap that conversion had opened{price}."


def _price(report: Report, gain: float, unit: str) -> str:
    tokens, seconds = facts.trained_tokens(report) / gain, facts.training_seconds(report) / gain
    return f", at {f.count(tokens)} tokens and {f.duration(seconds)} per {unit}"


def _subject(result: ModelResult, inside: bool = False) -> str:
    """How a sentence calls a model: by its name, unless that is only its role."""
    return result.name if result.name != result.role else f"{'the' if inside else 'The'} {result.role}"


def _away(distance: float) -> str:
    return f"{abs(distance):.3f} {'above' if distance >= 0 else 'below'}"
