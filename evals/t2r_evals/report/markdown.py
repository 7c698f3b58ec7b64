"""report.md: the record for a terminal, a diff or a pull request."""

import json
import re

from t2r_evals.report import tables
from t2r_evals.report.plots import figures
from t2r_evals.report.verdict import verdict
from t2r_evals.schema import Report


def render_markdown(report: Report) -> str:
    """The report as GitHub-flavoured Markdown. Figures are referred to as figures/NAME.svg beside it."""
    drawn = figures(report)
    parts = [f"# {_inline(report.title)}", ""]
    parts += [f"- {_inline(sentence)}" for sentence in verdict(report)] + [""]

    def section(title: str, found: list[tables.Table | None], name: str | None = None) -> None:
        shown = [table for table in found if table is not None]
        pictures = [figure for figure in drawn if figure.section == name]
        if not shown and not pictures:
            return
        parts.extend([f"## {title}", ""])
        for table in shown:
            parts.extend([*_table(table), ""])
        for figure in pictures:
            parts.extend([f"![{_inline(figure.caption)}](figures/{figure.name}.svg)", ""])

    section("Result", [tables.run_table(report), tables.language_table(report)], "verdict")
    section("Tasks", [tables.task_table(report)], "tasks")
    section("Paired comparison", [tables.comparison_table(report)])
    if (controls := tables.control_comparison_table(report)) is not None:
        title = "The controls against the teacher, and the student against the controls"
        parts += [f"<details><summary>{title}</summary>", "", *_table(controls), "", "</details>", ""]
    section("Recall by length and depth", [], "recall")
    section("Loss by position", [], "position")
    section("Components", [tables.component_table(report)])
    section("Speed and memory", [tables.size_table(report), tables.speed_table(report)], "speed")
    section("Training", [tables.stage_table(report)], "training")
    if report.worst:
        parts += ["## What got worse", ""]
        for example in report.worst:
            parts += [f"**{_inline(example.task)}**, `{example.document}`", "", *_fence(example.prompt), ""]
            parts += [f"- wanted: {_inline(example.target)}", f"- {_inline(example.baseline)}: "]
            parts[-1] += _inline(example.baseline_response)
            parts += [f"- {_inline(example.model)}: {_inline(example.model_response)}", ""]
    if report.samples:
        parts += ["## Samples", ""]
        for sample in report.samples:
            who = f"{_inline(sample.model)}, prompt" if sample.model else "Prompt"
            parts += [f"{who}:", "", *_fence(sample.prompt), "", "continued:", "", *_fence(sample.text), ""]
    if report.notes:
        parts += ["## Notes", "", *[f"- {_inline(note)}" for note in report.notes], ""]
    parts += ["## How this was made", ""]
    parts += [f"Created {report.created}.", ""]
    if report.command:
        parts += [*_fence(report.command), ""]
    facts = {**report.machine, **report.versions}
    if facts:
        parts += ["| | |", "|---|---|", *[f"| {_inline(k)} | {_inline(v)} |" for k, v in facts.items()], ""]
    if report.settings:
        settings = json.dumps(report.settings, indent=1, ensure_ascii=False)
        parts += ["<details><summary>Settings</summary>", "", *_fence(settings, "json"), "", "</details>", ""]
    return "\n".join(parts).rstrip() + "\n"


def _table(table: tables.Table) -> list[str]:
    head = "| " + " | ".join(_inline(column) for column in table.columns) + " |"
    rule = "|" + "|".join("---:" if table.is_numeric(i) else "---" for i in range(len(table.columns))) + "|"
    rows = ["| " + " | ".join(_inline(cell.text) for cell in row) + " |" for row in table.rows]
    return [head, rule, *rows] + (["", _inline(table.note)] if table.note else [])


def _inline(text: str) -> str:
    """Text on one line that Markdown leaves as it is."""
    return re.sub(r"([\\`*_<>|\[\]])", r"\\\1", re.sub(r"\s+", " ", text)).strip()


def _fence(text: str, language: str = "text") -> list[str]:
    """A code block whose fence is longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}{language}", text, fence]
