"""Forward and backward pass: on the fast path where the sizes fit it, in pieces where a tile cannot hold all slots, and
on the general path elsewhere."""

from ...triton_chunks import choose_numerics, find_chunks
from . import wide
from .backward import backward
from .common import choose_blocks
from .forward import forward
from .walk import fits
from .walk_backward import walk_backward
from .walk_forward import walk_forward


def run_forward(q, k, v, log_alpha, visible, scale, initial, final, cu_seqlens):
    """o [B, T, HQ, V] of contiguous inputs; writes `final` (pair of fp32 states, or None)."""
    sizes = (q.shape[2], k.shape[2], q.shape[3], v.shape[3], log_alpha.shape[3])
    if fits(*sizes, q.dtype):
        return walk_forward(q, k, v, log_alpha, visible, scale, initial, final, cu_seqlens)
    if log_alpha.shape[3] > wide.MOST_SLOTS:
        return wide.forward(q, k, v, log_alpha, visible, scale, initial, final, cu_seqlens)
    numerics = choose_numerics(q.dtype)
    blocks = choose_blocks(*sizes, numerics.store.itemsize)
    chunks = find_chunks(q.shape[0], q.shape[1], blocks.chunk, cu_seqlens)
    return forward(q, k, v, log_alpha, visible, scale, initial, final, chunks, blocks, numerics)


def run_backward(q, k, v, log_alpha, visible, do, dfinal, scale, initial, cu_seqlens):
    """(dq, dk, dv, dlog_alpha in fp32, gradients of the initial states in fp32 or None)."""
    sizes = (q.shape[2], k.shape[2], q.shape[3], v.shape[3], log_alpha.shape[3])
    if fits(*sizes, q.dtype):
        return walk_backward(q, k, v, log_alpha, visible, do, dfinal, scale, initial, cu_seqlens)
    if log_alpha.shape[3] > wide.MOST_SLOTS:
        return wide.backward(q, k, v, log_alpha, visible, do, dfinal, scale, initial, cu_seqlens)
    numerics = choose_numerics(q.dtype)
    blocks = choose_blocks(*sizes, numerics.store.itemsize)
    chunks = find_chunks(q.shape[0], q.shape[1], blocks.chunk, cu_seqlens)
    return backward(q, k, v, log_alpha, visible, do, dfinal, scale, initial, chunks, blocks, numerics)
