"""Conversion of a pretrained Transformer: plan from headers, stream, initialise, verify, publish."""

from t2r.convert.plan import Plan, TensorPlan, make_plan
from t2r.convert.run import convert

__all__ = ["Plan", "TensorPlan", "convert", "make_plan"]
