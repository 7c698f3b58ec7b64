"""GLA in Triton: `run_forward` and `run_backward` (chunked), `gla_step_triton` (one decode step, in place)."""

from .ops import run_backward, run_forward
from .step import gla_step_triton

__all__ = ["gla_step_triton", "run_backward", "run_forward"]
