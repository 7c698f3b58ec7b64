"""GSA in Triton: `run_forward` and `run_backward` (chunked), `gsa_step_triton` (one decode step, in place) and
`gates_triton` (log alpha from logits)."""

from .gates import gates_triton
from .ops import run_backward, run_forward
from .step import gsa_step_triton

__all__ = ["gates_triton", "gsa_step_triton", "run_backward", "run_forward"]
