"""GSA in Triton: `gsa_triton` (chunked, with gradients) and `gsa_step_triton` (one decode step, in place)."""

from .ops import gsa_triton
from .step import gsa_step_triton

__all__ = ["gsa_step_triton", "gsa_triton"]
