"""`report.json` is the record; Markdown and HTML are pure functions of it."""

from t2r_evals.report.html import render_html
from t2r_evals.report.markdown import render_markdown
from t2r_evals.report.store import load_report, write_report

__all__ = ["load_report", "render_html", "render_markdown", "write_report"]
