"""report.html: one self-contained file."""

from t2r_evals.schema import Report


def render_html(report: Report) -> str:
    """The report as one HTML file without any reference to another."""
    raise NotImplementedError
