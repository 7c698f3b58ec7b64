"""More slots than a tile can hold: the slots in pieces, each two gated linear attentions, with the softmax between.

The scores of a slot, and what it adds to the output, depend on no other slot; only the softmax sees them all. So

    s_t = scale K_t q_t     is linear attention from k_t to w_t, gated on the value side,
    o_t = V_t^T p_t         from w_t to v_t, gated on the key side,

(`t2r_kernels.gla`'s docstring), piece by piece. Scores stay in fp32; s and p, [B, T, HQ, M], exist for the length of a
pass and are computed again for the backward one, so that only the inputs are kept.
"""

from itertools import pairwise

import torch
from torch import Tensor

from ...gla.triton.ops import run_backward as gla_backward
from ...gla.triton.ops import run_forward as gla_forward
from ..naive import State

MOST_SLOTS = 256  # that a tile holds


def _pieces(slots: int) -> list[slice]:
    """Equal pieces, as few as possible."""
    count = -(-slots // MOST_SLOTS)
    edges = [slots * index // count for index in range(count + 1)]
    return [slice(first, last) for first, last in pairwise(edges)]


class _Piece:
    """Some of the slots: their gates, write weights and initial states."""

    def __init__(self, at: slice, k: Tensor, log_alpha: Tensor, initial: State | None) -> None:
        self.at = at
        self.log_alpha = self.of(log_alpha)
        self.write = -torch.expm1(self.log_alpha)
        self.ones = torch.ones_like(self.log_alpha, dtype=k.dtype)
        self.keys = None if initial is None else initial[0][:, :, at].mT.contiguous()  # [N, H, D, M]
        self.values = None if initial is None else initial[1][:, :, at].contiguous()  # [N, H, M, V]

    def of(self, x: Tensor) -> Tensor:
        """This piece's part of [..., M]."""
        return x[..., self.at].contiguous()

    def gate_gradient(self, dgate: Tensor | None, dwrite: Tensor | None) -> Tensor:
        """Of log alpha, which also gives the write weights 1 - alpha."""
        assert dgate is not None
        assert dwrite is not None
        return dgate + dwrite * (self.write - 1)

    def state(self, like: Tensor | None, turned: bool) -> Tensor | None:
        """Room for a final state, or the gradient of one, [N, H, M, :] of all slots in `like`; turned: [N, H, :, M]."""
        if like is None:
            return None
        own = like[:, :, self.at]
        return (own.mT if turned else own).contiguous()


def _probabilities(q, k, pieces: list[_Piece], visible, scale, final: Tensor | None, cu_seqlens) -> Tensor:
    """softmax(scale K q) [B, T, HQ, M] in fp32; writes the final keys if given."""
    scores = []
    for piece in pieces:
        keys = piece.state(final, turned=True)
        scores.append(
            gla_forward(
                q, k, piece.ones, piece.log_alpha, piece.write, piece.keys, keys, cu_seqlens, "value", scale,
                torch.float32,
            )
        )  # fmt: skip
        if final is not None and keys is not None:
            final[:, :, piece.at] = keys.mT
    s = torch.cat(scores, -1)
    if visible is not None:
        hidden = torch.arange(s.shape[-1], device=s.device) >= visible[:, :, None, None]
        s.masked_fill_(hidden, -torch.inf)
    return s.softmax(-1)


def forward(q, k, v, log_alpha, visible, scale, initial, final, cu_seqlens):
    """As `ops.run_forward`."""
    pieces = [_Piece(at, k, log_alpha, initial) for at in _pieces(log_alpha.shape[-1])]
    final_k, final_v = final or (None, None)
    p = _probabilities(q, k, pieces, visible, scale, final_k, cu_seqlens).to(q.dtype)
    o = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float32, device=q.device)
    for piece in pieces:
        values = piece.state(final_v, turned=False)
        o += gla_forward(
            piece.of(p), piece.ones, v, piece.log_alpha, piece.write, piece.values, values,
            cu_seqlens, "key", 1.0, torch.float32,
        )  # fmt: skip
        if final_v is not None:
            final_v[:, :, piece.at] = values
    return o.to(q.dtype)


def backward(q, k, v, log_alpha, visible, do, dfinal, scale, initial, cu_seqlens):
    """As `ops.run_backward`."""
    pieces = [_Piece(at, k, log_alpha, initial) for at in _pieces(log_alpha.shape[-1])]
    dfinal_k, dfinal_v = dfinal or (None, None)
    p = _probabilities(q, k, pieces, visible, scale, None, cu_seqlens)
    dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))
    dp, dgates = torch.empty_like(p), torch.empty_like(log_alpha, dtype=torch.float32)
    dinitial = None if initial is None else [torch.empty_like(x, dtype=torch.float32) for x in initial]
    for piece in pieces:
        dpiece, _, dvalue, dgate, dwrite, dvalues = gla_backward(
            do, piece.state(dfinal_v, turned=False), piece.of(p).to(q.dtype), piece.ones, v, piece.log_alpha,
            piece.write, piece.values, cu_seqlens, "key", 1.0, torch.float32,
        )  # fmt: skip
        dp[..., piece.at] = dpiece
        dv += dvalue
        dgates[..., piece.at] = piece.gate_gradient(dgate, dwrite)
        if dinitial is not None and dvalues is not None:
            dinitial[1][:, :, piece.at] = dvalues
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    for piece in pieces:
        dquery, dkey, _, dgate, dwrite, dkeys = gla_backward(
            piece.of(ds).to(q.dtype), piece.state(dfinal_k, turned=True), q, k, piece.ones, piece.log_alpha,
            piece.write, piece.keys, cu_seqlens, "value", scale, torch.float32,
        )  # fmt: skip
        dq += dquery
        dk += dkey
        dgates[..., piece.at] += piece.gate_gradient(dgate, dwrite)
        if dinitial is not None and dkeys is not None:
            dinitial[0][:, :, piece.at] = dkeys.mT
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dgates, dinitial
