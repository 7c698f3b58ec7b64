"""report.html: one self-contained file, readable in light and dark, on a phone and on paper."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from t2r_evals.report import facts, tables
from t2r_evals.report import formats as f
from t2r_evals.report.plots import figures
from t2r_evals.report.svg import STYLE
from t2r_evals.report.verdict import verdict
from t2r_evals.schema import Report


@dataclass(frozen=True)
class Tile:
    value: str
    label: str


def render_html(report: Report) -> str:
    """The report as one HTML file without any reference to another."""
    from markupsafe import Markup

    return _template().render(
        report=report,
        verdict=verdict(report),
        tiles=tiles(report),
        tables={
            "runs": tables.run_table(report),
            "language": tables.language_table(report),
            "tasks": tables.task_table(report),
            "comparison": tables.comparison_table(report),
            "controls": tables.control_comparison_table(report),
            "components": tables.component_table(report),
            "size": tables.size_table(report),
            "speed": tables.speed_table(report),
            "stages": tables.stage_table(report),
        },
        figures=figures(report),
        facts={**report.machine, **report.versions},
        settings=json.dumps(report.settings, indent=1, ensure_ascii=False) if report.settings else "",
        chart_style=Markup(STYLE),
    )


def tiles(report: Report) -> list[Tile]:
    """The few numbers to remember, of the first student."""
    student = next(iter(report.by_role("student")), None)
    if student is None:
        return []
    found = []
    distance = facts.excess(report, student)
    if distance is not None:
        found.append(Tile(f.signed(distance), "nats per token against the teacher"))
    pairs = [facts.comparison_of(report, student, name) for name in student.tasks]
    shares = [pair.recovered for pair in pairs if pair is not None and pair.recovered is not None]
    if shares:
        found.append(
            Tile(
                f"{100 * sum(shares) / len(shares):.0f}%",
                f"of the gain over chance kept ({f.plural(len(shares), 'task')})",
            )
        )
    if report.stages:
        found.append(Tile(f.count(facts.trained_tokens(report)), "training tokens"))
        found.append(Tile(f.duration(sum(stage.seconds for stage in report.stages)), "training time"))
    if student.state_bytes:
        found.append(
            Tile(
                f.size(student.state_bytes),
                "state per sequence" + (", beside a KV cache" if student.kv_bytes_per_token else ", at any length"),
            )
        )
    cross = facts.crossover(student, facts.teacher_of(report, student))
    if cross is not None:
        found.append(Tile(f"{cross:,}", "tokens from which it needs less memory"))
    return found


@cache
def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string((Path(__file__).parent / "page.html.j2").read_text(encoding="utf-8"))
