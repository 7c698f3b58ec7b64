"""GLA in Triton: `gla_triton` (chunked, with gradients) and `gla_step_triton` (one decode step, in place)."""

from .ops import gla_triton
from .step import gla_step_triton

__all__ = ["gla_step_triton", "gla_triton"]
