"""Forward and backward pass: on the fast path where the sizes fit it, on the general path elsewhere, and on both in
pieces where one program cannot hold all slots of a head."""

from ...triton_passes import repeated
from . import pieces
from .backward import backward
from .forward import forward
from .walk import most_slots
from .walk_backward import walk_backward
from .walk_forward import walk_forward

MOST_SLOTS = 64  # of a program on the general path


@repeated
def run_forward(q, k, v, log_alpha, visible, scale, initial, final, cu_seqlens):
    """o [B, T, HQ, V] of contiguous inputs; writes `final` (pair of fp32 states, or None)."""
    fast = most_slots(q.shape[2], k.shape[2], q.shape[3], v.shape[3], q.dtype)
    run = walk_forward if fast else forward
    cut = pieces.choose(log_alpha.shape[3], fast or MOST_SLOTS)
    return pieces.forward(cut, run, q, k, v, log_alpha, visible, scale, initial, final, cu_seqlens)


@repeated
def run_backward(q, k, v, log_alpha, visible, do, dfinal, scale, initial, cu_seqlens):
    """(dq, dk, dv, dlog_alpha in fp32, gradients of the initial states in fp32 or None)."""
    fast = most_slots(q.shape[2], k.shape[2], q.shape[3], v.shape[3], q.dtype)
    run = walk_backward if fast else backward
    cut = pieces.choose(log_alpha.shape[3], fast or MOST_SLOTS)
    return pieces.backward(cut, run, q, k, v, log_alpha, visible, do, dfinal, scale, initial, cu_seqlens)
