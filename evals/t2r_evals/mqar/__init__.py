"""Multi-query associative recall (MQAR; Zoology, arXiv 2312.04927), in the setting of the GSA paper.

A sequence lists K pairs of a key and a value, then asks for the keys again, more often soon than late; the model names
the value at each. Small models are trained from scratch on it: accuracy against width shows what a mixer's state holds.
"""

from t2r_evals.mqar.convolution import add_short_convolutions
from t2r_evals.mqar.examples import Examples, MqarOptions, make_examples
from t2r_evals.mqar.sweep import PAPER_LEARNING_RATES, best_results, draw, draw_curves, sweep
from t2r_evals.mqar.training import Epoch, MqarResult, accuracy, train

__all__ = [
    "PAPER_LEARNING_RATES",
    "Epoch",
    "Examples",
    "MqarOptions",
    "MqarResult",
    "accuracy",
    "add_short_convolutions",
    "best_results",
    "draw",
    "draw_curves",
    "make_examples",
    "sweep",
    "train",
]
