"""One decode step: the state is read once, updated in place and used by every query head of the group."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton_chunks import pad
from ...triton_launch import launch
from .common import NONE, SCALAR

KEY, VALUE = tl.constexpr(2), tl.constexpr(3)


@triton.jit
def step_kernel(
    q, k, v, log_decay, write, state, o, H, HQ, scale,
    D: tl.constexpr, V: tl.constexpr, G: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """One (sequence, key/value head) and BV columns of its state, which stay in registers."""
    pid = tl.program_id(0).to(tl.int64)
    b = pid // H
    h = pid - b * H
    d = tl.arange(0, BD)
    e = tl.program_id(1) * BV + tl.arange(0, BV)
    cell = state + pid * (D * V) + d[:, None] * V + e[None, :]
    mask = (d < D)[:, None] & (e < V)[None, :]
    old = tl.load(cell, mask=mask, other=0.0)
    kb = tl.load(k + pid * D + d, mask=d < D, other=0.0).to(tl.float32)
    vb = tl.load(v + pid * V + e, mask=e < V, other=0.0).to(tl.float32)
    if WEIGHTED:
        if GATE == KEY:
            kb *= tl.load(write + pid * D + d, mask=d < D, other=0.0).to(tl.float32)
        elif GATE == VALUE:
            vb *= tl.load(write + pid * V + e, mask=e < V, other=0.0).to(tl.float32)
        else:
            kb *= tl.load(write + pid).to(tl.float32)
    if GATE == KEY:
        old *= tl.exp(tl.load(log_decay + pid * D + d, mask=d < D, other=0.0).to(tl.float32))[:, None]
    elif GATE == VALUE:
        old *= tl.exp(tl.load(log_decay + pid * V + e, mask=e < V, other=0.0).to(tl.float32))[None, :]
    elif GATE == SCALAR:
        old *= tl.exp(tl.load(log_decay + pid).to(tl.float32))
    new = old + kb[:, None] * vb[None, :]
    tl.store(cell, new, mask=mask)
    row = b * HQ + h * G
    for g in range(G):
        qb = tl.load(q + (row + g) * D + d, mask=d < D, other=0.0).to(tl.float32)
        tl.store(o + (row + g) * V + e, tl.sum(new * qb[:, None], 0) * scale, mask=e < V)


def gla_step_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    gate: str | None,
    write: Tensor | None,
    scale: float,
) -> Tensor:
    """Shapes as in `t2r_kernels.gla_step`. One launch, no synchronisation: usable inside a CUDA graph."""
    if not state.is_contiguous():
        raise ValueError(f"gla_step: state has strides {state.stride()}, must be contiguous to be updated in place")
    q, k, v = (x.contiguous() for x in (q, k, v))
    log_decay, write = (None if x is None else x.contiguous() for x in (log_decay, write))
    B, HQ, D = q.shape
    H, V = k.shape[1], v.shape[-1]
    o = torch.empty(B, HQ, V, dtype=q.dtype, device=q.device)
    columns = min(32, pad(V))  # whole sectors of memory, and enough programs for small batches
    kind = {None: NONE, "scalar": SCALAR, "key": KEY, "value": VALUE}[gate].value
    launch(
        step_kernel, (B * H, triton.cdiv(V, columns)),
        q, k, v, log_decay, write, state, o, H, HQ, float(scale), D, V, HQ // H, triton.next_power_of_2(D), columns,
        GATE=kind, WEIGHTED=write is not None, num_warps=2 if D <= 128 else 4,
    )  # fmt: skip
    return o
