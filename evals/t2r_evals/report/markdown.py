"""report.md."""

from t2r_evals.schema import Report


def render_markdown(report: Report) -> str:
    """The report as GitHub-flavoured Markdown."""
    raise NotImplementedError
