"""Named sets of tasks, with the metric and shots of the GSA paper (arXiv 2409.07146, table 3) where it has them."""

import difflib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from t2r_evals.errors import InputError


@dataclass(frozen=True)
class TaskSpec:
    """An lm-eval task as a suite wants it; None leaves the task's own setting.

    `generation` overrides the task's generation arguments.
    """

    task: str
    metric: str | None = None
    shots: int | None = None
    generation: tuple[tuple[str, Any], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


# The setting of the Based paper (arXiv 2402.18668) for its recall tasks: one line, at most 48 tokens.
_ONE_LINE = (("until", ["\n"]), ("max_gen_toks", 48))

SUITES: dict[str, tuple[TaskSpec, ...]] = {
    "language": (),
    "synthetic": (),
    "commonsense": (
        TaskSpec("arc_easy", "acc", 0),
        TaskSpec("arc_challenge", "acc_norm", 0),
        TaskSpec("hellaswag", "acc_norm", 0),
        TaskSpec("piqa", "acc", 0),
        TaskSpec("winogrande", "acc", 0),
        TaskSpec("lambada_openai", "acc", 0),
    ),
    "knowledge": (
        TaskSpec("nq_open", "exact_match", 5),
        TaskSpec("triviaqa", "exact_match", 5),
        TaskSpec("bbh", "exact_match", 3),
        TaskSpec("mmlu", "acc", 5),
    ),
    "recall": (
        TaskSpec("fda", "contains", 0, _ONE_LINE),
        TaskSpec("swde", "contains", 0, _ONE_LINE),
        TaskSpec("squad_completion", "contains", 0, _ONE_LINE),
        TaskSpec("cloze_nq", "contains", 0),
        TaskSpec("cloze_triviaqa", "contains", 0),
        TaskSpec("cloze_drop", "contains", 0),
    ),
}


def resolve_tasks(suites: Sequence[str], tasks: Sequence[str], shots: int | None) -> list[TaskSpec]:
    """The tasks of `suites`, then `tasks` by name; a task that belongs to a suite has that suite's setting either way.

    Args:
        shots: replaces every task's own number; None leaves them.

    Raises:
        InputError: an unknown suite, with the nearest name.
    """
    specs: dict[str, TaskSpec] = {}
    for suite in suites:
        if suite not in SUITES:
            near = difflib.get_close_matches(suite, SUITES, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(SUITES)}"
            raise InputError(f"suites: {suite!r} is no suite; {hint}")
        specs |= {spec.task: spec for spec in SUITES[suite]}
    known = {spec.task: spec for suite in SUITES.values() for spec in suite}
    for task in tasks:
        specs.setdefault(task, known.get(task, TaskSpec(task)))
    if shots is None:
        return list(specs.values())
    return [TaskSpec(spec.task, spec.metric, shots, spec.generation) for spec in specs.values()]
