"""The report is a function of its JSON; the page stands alone and shows in a real browser."""

import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from t2r_evals import InputError, load_report, render_html, render_markdown, schema, write_report
from t2r_evals.compare import compare_all, compare_values
from t2r_evals.merge import merge_reports
from t2r_evals.report import facts, formats, tables
from t2r_evals.report.plots import figures
from t2r_evals.report.verdict import verdict
from tests.evals.conftest import task_result


@pytest.fixture
def folder(report: schema.Report, tmp_path: Path) -> Path:
    write_report(report, tmp_path / "report")
    return tmp_path / "report"


def test_markdown_and_html_are_functions_of_the_json(folder: Path) -> None:
    again = load_report(folder)
    assert render_markdown(again) == (folder / "report.md").read_text()
    assert render_html(again) == (folder / "report.html").read_text()
    assert load_report(folder / "report.json") == again


def test_every_number_of_the_verdict_is_there(folder: Path) -> None:
    text = (folder / "report.md").read_text()
    assert "0.170 above the teacher's 2.722" in text
    assert "0.130 better than no training (+0.300), 0.040 better than window only (+0.210)" in text
    assert "Training closed 43% of the gap" in text
    assert (
        "| arc\\_easy | student | teacher | 200 | -5.0 | -10.4 to +0.4 | 10 | 20 | 170 | 90.0 | 0.0987 | 90.0 |" in text
    )


def test_tasks_have_a_sentence_and_an_average(report: schema.Report) -> None:
    one = "On arc_easy the student scores 70.0%, the teacher 75.0%: 90.0% of what the teacher has above chance; no"
    assert one in render_html(report.model_copy(update={"comparisons": compare_all(report.results)}))
    results = []
    for result, right in zip(report.results, (90, 20, 10, 10), strict=True):
        task, rows = task_result("piqa", [1] * right + [0] * (100 - right))
        lost = task.model_copy(update={"chance": 0.0})
        tasks = {**result.tasks, "piqa": lost}
        results.append(result.model_copy(update={"tasks": tasks, "samples": result.samples + rows}))
    told = render_markdown(report.model_copy(update={"results": results, "comparisons": compare_all(results)}))
    # (0.75 + 0.9) / 2 and (0.7 + 0.2) / 2, above (0.25 + 0) / 2
    assert "Over 2 tasks the student scores 45.0%, the teacher 82.5%: 46.4% of what" in told
    assert "; clearly worse on piqa." in told
    assert "| average of 2 | – | – | – | 12.5 | 82.5 | 45.0 | 27.5 | 30.0 | 46.4 |" in told


def test_a_hybrid_is_not_said_to_keep_its_memory_at_any_length(report: schema.Report) -> None:
    assert "keeps 2 MiB of state per sequence at any length" in render_markdown(report)
    teacher, student, *_ = report.results
    results = [teacher, student.model_copy(update={"kv_bytes_per_token": 1024})]
    told = render_markdown(report.model_copy(update={"results": results}))
    assert "keeps 2 MiB of state per sequence and 1 KiB per token, where softmax layers stayed; the" in told


def test_a_student_that_loses_to_a_control_is_told_so(report: schema.Report) -> None:
    teacher, student, *_ = report.results
    same = student.model_copy(update={"name": "window only", "role": "control"})
    assert teacher.language is not None
    better = same.model_copy(update={"language": teacher.language, "name": "other"})
    results = [teacher, student, same, better]
    told = render_markdown(report.model_copy(update={"results": results, "comparisons": compare_all(results)}))
    assert "not clearly better than window only (+0.170), 0.170 worse than other (+0.000)" in told


def test_samples_lie_beside_the_json(folder: Path) -> None:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(folder / "samples.parquet")
    assert table.num_rows == 4 * 200
    assert "hash7" not in (folder / "report.json").read_text()


def test_html_refers_to_nothing_outside_itself(folder: Path) -> None:
    class Links(html.parser.HTMLParser):
        found: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.found += [v for k, v in attrs if k in ("src", "href", "srcset", "action", "data") and v]

    page = (folder / "report.html").read_text()
    parser = Links()
    parser.feed(page)
    assert parser.found == ["data:,"]
    assert not re.search(r"@import|url\(", page)


def test_html_escapes_what_models_and_users_wrote(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    assert "<script>alert" not in page
    assert "<i>more</i>" not in page
    assert "&lt;i&gt;more&lt;/i&gt;" in page


def test_figures_are_well_formed_and_have_text_alternatives(folder: Path, report: schema.Report) -> None:
    names = {path.stem for path in (folder / "figures").iterdir()}
    assert {"loss-above-teacher", "memory-by-length", "loss-by-position", "training-1-align"} <= names
    for path in (folder / "figures").iterdir():
        root = ElementTree.fromstring(path.read_text())
        assert root.get("role") == "img"
        assert root.get("aria-label")
        axis_titles = [element for element in root.iter() if element.get("class") == "axis"]
        assert axis_titles, path.name


def test_a_report_of_one_model_without_anything_else_renders(report: schema.Report) -> None:
    bare = schema.Report(
        title="Bare", created="now", results=[schema.ModelResult(name="m", role="student")], comparisons=[], worst=[]
    )
    assert render_markdown(bare).startswith("# Bare\n")
    assert "<h1>Bare</h1>" in render_html(bare)
    assert figures(bare) == []


@pytest.mark.parametrize("version", [2, 0, None, "1"])
def test_unknown_schema_versions_are_refused(folder: Path, version: object) -> None:
    raw = json.loads((folder / "report.json").read_text())
    raw["schema_version"] = version
    (folder / "report.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match="schema_version"):
        load_report(folder)


def test_unknown_fields_are_refused_by_name(folder: Path) -> None:
    raw = json.loads((folder / "report.json").read_text())
    raw["results"][0]["lanugage"] = None
    (folder / "report.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match=r"results\.0\.lanugage"):
        load_report(folder)


def test_missing_report_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no report there"):
        load_report(tmp_path)


def test_runs_side_by_side_share_their_teacher(report: schema.Report) -> None:
    report = report.model_copy(update={"comparisons": compare_all(report.results)})
    merged = merge_reports({"a": report, "b": report.model_copy(update={"created": "2027-01-01T00:00:00Z"})})
    names = [result.name for result in merged.results]
    assert names.count("teacher") == 1
    assert {"a: student", "b: student"} < set(names)
    assert {c.baseline for c in merged.comparisons or [] if c.model.endswith("training")} == {"teacher"}
    assert "b: student" in render_html(merged)


def test_runs_side_by_side_keep_their_own_teachers_and_controls(report: schema.Report) -> None:
    """One run has tasks, the other has none and read other text: nothing of the one is measured by the other."""
    report = report.model_copy(update={"comparisons": compare_all(report.results)})
    other = []
    for result in report.results:
        assert result.language is not None
        language = result.language.model_copy(update={"loss": result.language.loss + 1, "data_sha256": "1" * 64})
        other.append(result.model_copy(update={"tasks": {}, "samples": [], "language": language}))
    bare = report.model_copy(update={"results": other, "comparisons": compare_all(other)})
    merged = merge_reports({"bare": bare, "full": report})
    student = next(result for result in merged.results if result.name == "full: student")
    teacher = facts.teacher_of(merged, student)
    assert teacher is not None
    assert teacher.name == "full: teacher"
    alone = next(result for result in report.results if result.name == "student")
    assert facts.excess(merged, student) == facts.excess(report, alone)
    said = " ".join(verdict(merged))
    assert "than full: no training" in said
    first, second = (line for line in verdict(merged) if line.startswith("Against the controls"))
    assert ("full: " in first, "bare: " in second) == (False, False)
    assert "Not all models read this text" in render_html(merged)
    assert "Not all models" not in render_html(report)


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (12, "12 B"), (1024, "1 KiB"), (2 * 2**20, "2 MiB"), (1030 * 2**20, "1.01 GiB")]
)
def test_sizes(value: float | None, text: str) -> None:
    assert formats.size(value) == text


def test_what_a_table_leaves_blank_sorts_last(report: schema.Report) -> None:
    one = compare_values(
        np.array([1.0]), np.array([0.5]), measurement="copy", metric="acc", model="student", baseline="teacher"
    )
    control = one.model_copy(update={"baseline": "no training", "recovered": 0.5})
    for table in (tables.comparison_table, tables.control_comparison_table):
        found = table(report.model_copy(update={"comparisons": [one, control]}))
        assert found is not None
        for cell in found.rows[0]:
            assert (cell.text == formats.BLANK) == (cell.key is None)


PROBE = """<!doctype html><body><script>
var errors = [], frame = document.createElement("iframe");
frame.style.cssText = "border:0;height:800px;width:WIDTHpx";
frame.onload = function () {
  var page = frame.contentDocument, view = frame.contentWindow;
  view.onerror = function (message) { errors.push(message); };
  var heads = page.querySelectorAll("table.sortable th button");
  heads.forEach(function (button) { button.click(); button.click(); });
  var first = page.querySelector("table.sortable"), column = first.tHead.rows[0].cells[1];
  column.querySelector("button").click();
  var keys = Array.from(first.tBodies[0].rows).map(function (row) { return +row.cells[1].dataset.key; });
  var pictures = Array.from(page.querySelectorAll("svg"));
  document.body.innerHTML = "";
  document.body.textContent = "PROBE" + JSON.stringify({
    errors: errors, scroll: page.documentElement.scrollWidth - page.documentElement.clientWidth, heads: heads.length,
    sorted: keys.every(function (key, i) { return i === 0 || keys[i - 1] <= key; }) && keys.length > 2,
    pictures: pictures.length, named: pictures.every(function (svg) { return svg.getAttribute("aria-label"); }),
    outside: pictures.filter(function (svg) { return Array.from(svg.querySelectorAll("text")).some(function (text) {
      var a = text.getBoundingClientRect(), b = svg.getBoundingClientRect();
      return a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 || a.bottom > b.bottom + 1; }); })
      .map(function (svg) { return svg.getAttribute("aria-label"); })
  }) + "PROBE";
};
document.body.appendChild(frame);
frame.srcdoc = SOURCE;
</script></body>"""


@pytest.mark.parametrize("width", [400, 1400])
def test_page_in_a_real_browser(folder: Path, tmp_path: Path, width: int) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("SKIPPED FOR LACK OF A BROWSER: chromium is not installed")
    source = json.dumps((folder / "report.html").read_text()).replace("</", "<\\/")
    probe = tmp_path / "probe.html"
    probe.write_text(PROBE.replace("WIDTH", str(width)).replace("SOURCE", source))
    switches = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    switches += " --disable-component-update --disable-sync --virtual-time-budget=5000 --window-size=1500,900"
    run = subprocess.run(
        [browser, *switches.split(), f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", probe.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    seen = json.loads(html.unescape(run.stdout.split("PROBE")[1]))
    assert seen["errors"] == []
    assert seen["scroll"] == 0
    assert seen["heads"] > 20
    assert seen["sorted"]
    assert seen["pictures"] >= 6
    assert seen["named"]
    assert seen["outside"] == []


@pytest.mark.parametrize(
    ("rates", "says"),
    [
        ((9, 30, 30), "It decodes faster than the teacher from 512 tokens of context on; 3.0 x at 1,024."),
        ((30, 9, 30), "It decodes faster than the teacher from 1,024 tokens of context on; 3.0 x at 1,024."),
        ((30, 30, 9), "It decodes slower than the teacher up to 1,024 tokens of context (0.90 x)."),
    ],
)
def test_the_student_is_ahead_from_where_it_stays_ahead(
    report: schema.Report, rates: tuple[float, ...], says: str
) -> None:
    def points(decode: tuple[float, ...]) -> list[schema.SpeedPoint]:
        return [
            schema.SpeedPoint(
                context=context,
                batch=1,
                prefill_tokens_per_second=1.0,
                decode_tokens_per_second=rate,
                first_token_seconds=1.0,
                peak_bytes=None,
                state_bytes=1,
            )
            for context, rate in zip((256, 512, 1024), decode, strict=True)
        ]

    teacher, student, *rest = report.results
    results = [
        teacher.model_copy(update={"speed": points((10, 10, 10))}),
        student.model_copy(update={"speed": points(rates)}),
        *rest,
    ]
    assert says in verdict(report.model_copy(update={"results": results}))
