"""Reading and writing report folders."""

import json
import os
from pathlib import Path

from pydantic import ValidationError

from t2r_evals.compare import compare_all, worst_examples
from t2r_evals.errors import InputError
from t2r_evals.report.html import render_html
from t2r_evals.report.markdown import render_markdown
from t2r_evals.report.plots import figures
from t2r_evals.report.svg import standalone
from t2r_evals.schema import SCHEMA_VERSION, Report


def write_report(report: Report, folder: Path) -> Report:
    """Write report.json, report.md, report.html, figures/*.svg (for papers and the Markdown) and, where there are
    per-sample results, samples.parquet.

    Comparisons and examples that the caller left out (None) are computed here. The folder is made when missing; its
    own files are replaced one by one, each whole or not at all.

    Returns:
        The report as written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if report.comparisons is None:
        report = report.model_copy(update={"comparisons": compare_all(report.results)})
    if report.worst is None:
        report = report.model_copy(update={"worst": worst_examples(report.results)})
    _replace(
        folder / "report.json", report.model_dump_json(indent=1, exclude={"results": {"__all__": {"samples"}}}) + "\n"
    )
    _replace(folder / "report.md", render_markdown(report))
    _replace(folder / "report.html", render_html(report))
    for figure in figures(report):
        (folder / "figures").mkdir(exist_ok=True)
        _replace(folder / "figures" / f"{figure.name}.svg", standalone(figure.svg))
    rows = [{"model": result.name, **row} for result in report.results for row in result.samples]
    if rows:
        import pyarrow
        import pyarrow.parquet

        temporary = folder / ".samples.parquet.partial"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), temporary)
        os.replace(temporary, folder / "samples.parquet")
    return report


def load_report(path: Path) -> Report:
    """The report in a file, or in a folder that holds report.json.

    Raises:
        InputError: no report there, not JSON, another schema version, or a field that breaks the schema.
    """
    path = Path(path)
    file = path / "report.json" if path.is_dir() else path
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file}: no report there") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: not a JSON report ({error})") from None
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION:
        raise InputError(f"{file}: schema_version is {version!r}; this t2r reads version {SCHEMA_VERSION}")
    try:
        return Report.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{file}: {where}: {first['msg']}") from None


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
