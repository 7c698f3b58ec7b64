"""Evaluation of a causal language model: gets a model and a tokenizer, knows nothing of conversion or training.

`evaluate` measures one model, `Report` is the record of several, `write_report` turns it into JSON, Markdown and HTML.
"""

from t2r_evals.errors import InputError
from t2r_evals.evaluate import EvaluationOptions, check_text, evaluate
from t2r_evals.report import load_report, render_html, render_markdown, write_report
from t2r_evals.schema import Conversion, ModelResult, Report, Sample, Stage

__all__ = [
    "Conversion",
    "EvaluationOptions",
    "InputError",
    "ModelResult",
    "Report",
    "Sample",
    "Stage",
    "check_text",
    "evaluate",
    "load_report",
    "render_html",
    "render_markdown",
    "write_report",
]
