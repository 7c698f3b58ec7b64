"""Gated Slot Attention in blocks of tokens, in plain torch: any device, float32 or float64.

With w = 1 - alpha and E[t, i] = alpha_{i+1} ... alpha_t (per slot), a block that starts with the states K, V gives

    s_t = E[t, start] * (K q_t) + sum_{i <= t} E[t, i] w_i (k_i . q_t)         value-side gated linear attention
    p_t = softmax(scale * s_t)
    o_t = V^T (E[t, start] * p_t) + sum_{i <= t} (sum_m p_t E[t, i] w_i) v_i    key-side gated linear attention

The weights E[t, i] w_i are computed once and serve both sums and both state updates. The query heads of a group are
rows of the matrices they multiply with; k, v and the states are never repeated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..blocks import Blocks, carry, decays
from .naive import State, zero_state

BLOCK = 16


def gsa_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    scale: float,
    initial_state: State | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, State | None]:
    """Shapes as in `t2r_kernels.gsa`. Computes in float32, or in float64 when q is float64."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    heads, dim_k, dim_v, slots = k.shape[2], k.shape[3], v.shape[3], log_alpha.shape[3]
    blocks = Blocks.cut(k, cu_seqlens, BLOCK)
    qb, kb, vb, log_alpha_b = (
        blocks.gather(x).to(dtype) for x in (q.unflatten(2, (heads, -1)), k, v, log_alpha)
    )  # [blocks, H, C, (G,) ...]
    count, _, _, group, _ = qb.shape
    x = count * heads
    qb, kb, vb, log_alpha_b = (
        qb.reshape(x, BLOCK * group, dim_k),
        kb.reshape(x, BLOCK, dim_k),
        vb.reshape(x, BLOCK, dim_v),
        log_alpha_b.reshape(x, BLOCK, slots),
    )
    since_start, since_token = decays(log_alpha_b.exp(), -torch.expm1(log_alpha_b))

    if initial_state is None:
        sequences = k.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        initial_state = zero_state(k, v, log_alpha, sequences)
    to_end = since_token[:, -1].mT  # [X, M, C]
    decay = since_start[:, -1].reshape(count, heads, slots, 1)
    entry, final = zip(
        *(
            carry(blocks.sort(s.to(dtype)), decay, (to_end @ y).unflatten(0, (count, heads)), blocks.active)
            for s, y in zip(initial_state, (kb, vb), strict=True)
        ),
        strict=True,
    )
    entry_k, entry_v = (e.flatten(0, 1) for e in entry)

    per_token = since_token.flatten(0, 1)  # [X * C, C, M]: each token has its own weights
    start = since_start.unsqueeze(2)
    scores = (qb @ entry_k.mT).unflatten(1, (BLOCK, group)) * start
    inner = (qb @ kb.mT).view(x * BLOCK, group, BLOCK)
    p = torch.baddbmm(scores.flatten(0, 1), inner, per_token).mul(scale).softmax(-1)
    outer = (p.view(x, BLOCK, group, slots) * start).flatten(1, 2)
    o = torch.baddbmm(outer @ entry_v, (p @ per_token.mT).view(x, BLOCK * group, BLOCK), vb)

    o = blocks.scatter(o.view(count, heads, BLOCK, group, dim_v)).flatten(2, 3).to(q.dtype)
    if not output_final_state:
        return o, None
    final_k, final_v = (blocks.unsort(s) for s in final)
    return o, (final_k, final_v)
