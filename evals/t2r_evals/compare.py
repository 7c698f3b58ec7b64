"""Paired comparison of models on the same items."""

from collections.abc import Sequence

from t2r_evals.schema import Comparison, ModelResult


def compare_all(results: Sequence[ModelResult]) -> list[Comparison]:
    """Every other model against the first teacher, on every measurement that both have."""
    raise NotImplementedError
