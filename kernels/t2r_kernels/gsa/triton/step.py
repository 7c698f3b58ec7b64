"""One decode step: the states are read once, updated in place and used by every query head of the group."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import LOG2E, write_weight


@triton.jit
def step_kernel(
    q, k, v, log_alpha, visible, state_k, state_v, o, H, HQ, scale_log2,
    D: tl.constexpr, V: tl.constexpr, M: tl.constexpr, G: tl.constexpr, BM: tl.constexpr,
    BD: tl.constexpr, BV: tl.constexpr, LIMITED: tl.constexpr,
):  # fmt: skip
    """One (sequence, key/value head); both states in registers, and loaded before the first is used."""
    pid = tl.program_id(0).to(tl.int64)
    b = pid // H
    h = pid - b * H
    m = tl.arange(0, BM)
    d = tl.arange(0, BD)
    e = tl.arange(0, BV)
    cell_k = state_k + pid * (M * D) + m[:, None] * D + d[None, :]
    cell_v = state_v + pid * (M * V) + m[:, None] * V + e[None, :]
    mask_k = (m < M)[:, None] & (d < D)[None, :]
    mask_v = (m < M)[:, None] & (e < V)[None, :]
    old_k = tl.load(cell_k, mask=mask_k, other=0.0)
    old_v = tl.load(cell_v, mask=mask_v, other=0.0)
    x = tl.load(log_alpha + pid * M + m, mask=m < M, other=0.0).to(tl.float32) * 1.4426950408889634
    alpha = tl.exp2(x)[:, None]
    w = write_weight(tl.maximum(x, -512.0))[:, None]
    new_k = old_k * alpha + w * tl.load(k + pid * D + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    new_v = old_v * alpha + w * tl.load(v + pid * V + e, mask=e < V, other=0.0).to(tl.float32)[None, :]
    tl.store(cell_k, new_k, mask=mask_k)
    tl.store(cell_v, new_v, mask=mask_v)
    limit = M
    if LIMITED:
        limit = tl.load(visible + b)
    row = b * HQ + h * G
    for g in range(G):
        qb = tl.load(q + (row + g) * D + d, mask=d < D, other=0.0).to(tl.float32)
        s = tl.sum(new_k * qb[None, :], 1) * scale_log2
        s = tl.where(m < limit, s, float("-inf"))
        p = tl.exp2(s - tl.max(s, 0))
        p = p / tl.sum(p, 0)
        tl.store(o + (row + g) * V + e, tl.sum(new_v * p[:, None], 0), mask=e < V)


@triton.jit
def sliced_step_kernel(
    q, k, v, log_alpha, visible, state_k, state_v, o, H, HQ, G, scale_log2,
    D: tl.constexpr, V: tl.constexpr, M: tl.constexpr, BG: tl.constexpr, BM: tl.constexpr,
    BD: tl.constexpr, BV: tl.constexpr, LIMITED: tl.constexpr,
):  # fmt: skip
    """The same for states too large for the registers, in slices of their columns."""
    pid = tl.program_id(0).to(tl.int64)
    b = pid // H
    h = pid - b * H
    m = tl.arange(0, BM)
    g = tl.arange(0, BG)
    row = b * HQ + h * G + g
    x = tl.load(log_alpha + pid * M + m, mask=m < M, other=0.0).to(tl.float32) * 1.4426950408889634
    alpha = tl.exp2(x)
    w = write_weight(tl.maximum(x, -512.0))
    s = tl.zeros([BG, BM], tl.float32)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        mask = (m < M)[:, None] & (d < D)[None, :]
        cell = state_k + pid * (M * D) + m[:, None] * D + d[None, :]
        kb = tl.load(k + pid * D + d, mask=d < D, other=0.0).to(tl.float32)
        state = tl.load(cell, mask=mask, other=0.0) * alpha[:, None] + w[:, None] * kb[None, :]
        tl.store(cell, state, mask=mask)
        qb = tl.load(q + row[:, None] * D + d[None, :], mask=(g < G)[:, None] & (d < D)[None, :], other=0.0)
        s += tl.sum(qb.to(tl.float32)[:, None, :] * state[None, :, :], 2)
    limit = M
    if LIMITED:
        limit = tl.load(visible + b)
    s = tl.where((m < limit)[None, :], s * scale_log2, float("-inf"))
    p = tl.exp2(s - tl.max(s, 1)[:, None])
    p = p / tl.sum(p, 1)[:, None]
    for d0 in range(0, V, BV):
        d = d0 + tl.arange(0, BV)
        mask = (m < M)[:, None] & (d < V)[None, :]
        cell = state_v + pid * (M * V) + m[:, None] * V + d[None, :]
        vb = tl.load(v + pid * V + d, mask=d < V, other=0.0).to(tl.float32)
        state = tl.load(cell, mask=mask, other=0.0) * alpha[:, None] + w[:, None] * vb[None, :]
        tl.store(cell, state, mask=mask)
        ob = tl.sum(p[:, :, None] * state[None, :, :], 1)
        tl.store(o + row[:, None] * V + d[None, :], ob, mask=(g < G)[:, None] & (d < V)[None, :])


def gsa_step_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    state: tuple[Tensor, Tensor],
    scale: float,
    visible: Tensor | None = None,
) -> Tensor:
    """Shapes as in `t2r_kernels.gsa_step`. One launch, no synchronisation: usable inside a CUDA graph."""
    state_k, state_v = state
    for name, x in (("K", state_k), ("V", state_v)):
        if not x.is_contiguous():
            raise ValueError(
                f"gsa_step: state {name} has strides {x.stride()}, must be contiguous to be updated in place"
            )
    q, k, v, log_alpha = (x.contiguous() for x in (q, k, v, log_alpha))
    visible = None if visible is None else visible.contiguous()
    B, HQ, D = q.shape
    H, V, M = k.shape[1], v.shape[-1], log_alpha.shape[-1]
    o = torch.empty(B, HQ, V, dtype=q.dtype, device=q.device)
    group, slots = HQ // H, triton.next_power_of_2(M)
    tensors = (q, k, v, log_alpha, visible, state_k, state_v, o, H, HQ)
    limited = visible is not None
    wide = (triton.next_power_of_2(D), triton.next_power_of_2(V))
    if slots * sum(wide) <= 64 * 256:
        step_kernel[(B * H,)](
            *tensors, scale * LOG2E, D, V, M, group, slots, *wide, LIMITED=limited,
            num_warps=8 if slots * sum(wide) >= 64 * 128 else 4,
        )  # fmt: skip
        return o
    padded = triton.next_power_of_2(group)
    width = max(4, min(64, 16384 // (padded * slots)))  # the product [group, slots, width] lives in registers
    sliced_step_kernel[(B * H,)](
        *tensors, group, scale * LOG2E, D, V, M, padded, slots, *(min(width, x) for x in wide), LIMITED=limited,
        num_warps=4,
    )  # fmt: skip
    return o
