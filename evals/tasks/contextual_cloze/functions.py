"""The functions that the task definitions beside this file name."""

from t2r_evals.cloze import contains_any as score
from t2r_evals.cloze import prepare, prompt

__all__ = ["prepare", "prompt", "score"]
