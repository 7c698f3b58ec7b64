"""GSA in Triton: `gsa_triton` (chunked, with gradients), `gsa_step_triton` (one decode step, in place) and
`gates_triton` (log alpha from logits)."""

from .gates import gates_triton
from .ops import gsa_triton
from .step import gsa_step_triton

__all__ = ["gates_triton", "gsa_step_triton", "gsa_triton"]
