"""Gated Slot Attention: `gsa` over sequences, `gsa_step` for one decoded token, `gsa_gates` for their log alpha."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from .chunk import gsa_chunk
from .gates import gsa_gates
from .naive import State, gsa_naive, gsa_step_torch
from .ops import gsa_operator


def gsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    *,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    visible: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, State | None]:
    """Gated Slot Attention (Zhang et al., arXiv 2409.07146), causal, with M slots per key/value head:

        K_t = alpha_t K_{t-1} + (1 - alpha_t) k_t^T,   V_t likewise,   o_t = V_t^T softmax(scale * K_t q_t)

    Args:
        q: [B, T, HQ, D]. Query head h reads key/value head h // (HQ // H).
        k: [B, T, H, D].
        v: [B, T, H, V].
        log_alpha: [B, T, H, M] in [-inf, 0], the logarithm of the gate; best in float32. Not checked.
        scale: of the scores; D ** -0.5 by default.
        initial_state: K [N, H, M, D] and V [N, H, M, V]; zeros by default. N is B, or the number of documents.
        output_final_state: also return the states after the last token, shaped alike.
        cu_seqlens: int32 [N + 1], where each of N documents packed into one row (B = 1) starts and ends; documents may
            be empty and see nothing of each other.
        visible: integers [B, T] in [1, M], not checked: token t reads only the slots m < visible[t]; all by default.
            For slots that nothing was written to yet, which would draw the softmax towards their zeros.
        backend: "auto" (triton on a GPU, torch elsewhere), "naive", "torch" or "triton".

    Returns:
        o [B, T, HQ, V] in q's dtype, and None or the final states in float32 (float64 when q is float64). Gradients
        flow to q, k, v, log_alpha and the initial states, from o and the final states.

    Raises:
        ValueError: shapes, dtypes, devices or cu_seqlens that do not fit, or a backend that cannot run here.
    """
    dispatch.check_sequences("gsa", q, k, v)
    sequences = dispatch.count_sequences("gsa", k, cu_seqlens)
    dispatch.check_shape("gsa", "log_alpha", log_alpha, (*k.shape[:3], None), "[B, T, H, M]")
    _check_state("gsa", initial_state, sequences, q, k, v, log_alpha)
    _check_visible("gsa", visible, k)
    chosen = dispatch.choose("gsa", backend, (q, k, v, log_alpha))
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    args = (q, k, v, log_alpha, scale, initial_state, output_final_state, cu_seqlens, visible)
    # where it is watched torch's path is an operator too; by itself it can keep more for its backward pass
    if chosen == "triton" or (chosen == "torch" and dispatch.watched(q)):
        return gsa_operator(*args, chosen)
    with dispatch.without_autocast(q.device):
        return gsa_naive(*args) if chosen == "naive" else gsa_chunk(*args)


@torch.no_grad()
def gsa_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    state: State,
    *,
    scale: float | None = None,
    visible: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """One token of `gsa` in decoding; the state is updated in place and no gradient is recorded.

    Args:
        q: [B, HQ, D].
        k: [B, H, D].
        v: [B, H, V].
        log_alpha: [B, H, M].
        state: K [B, H, M, D] and V [B, H, M, V], float32, as `gsa` returns them.
        scale: of the scores; D ** -0.5 by default.
        visible: integers [B], as in `gsa`.
        backend: as in `gsa`; "naive" and "torch" are the same here.

    Returns:
        o [B, HQ, V] in q's dtype.

    Raises:
        ValueError: shapes or devices that do not fit, or a backend that cannot run here.
    """
    if k.dim() != 3:
        raise ValueError(f"gsa_step: k has shape {tuple(k.shape)}, must be [B, H, D]")
    batch, heads, dim = k.shape
    dispatch.check_shape("gsa_step", "q", q, (batch, None, dim), "[B, HQ, D]")
    dispatch.check_shape("gsa_step", "v", v, (batch, heads, None), "[B, H, V]")
    dispatch.check_shape("gsa_step", "log_alpha", log_alpha, (batch, heads, None), "[B, H, M]")
    dispatch.check_group("gsa_step", q.shape[1], heads)
    _check_state("gsa_step", state, batch, q, k, v, log_alpha)
    _check_visible("gsa_step", visible, k)
    scale = dim**-0.5 if scale is None else scale
    if dispatch.choose("gsa", backend, (q, k, v, log_alpha, *state)) == "triton":
        return _gsa_step_triton(q, k, v, log_alpha, state, scale, visible)
    with dispatch.without_autocast(q.device):
        return gsa_step_torch(q, k, v, log_alpha, state, scale, visible)


def _gsa_step_triton(*args):
    from .triton import gsa_step_triton

    return gsa_step_triton(*args)


def _check_state(
    op: str, state: State | None, sequences: int, q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor
) -> None:
    state_k, state_v = (None, None) if state is None else state
    named = {"k": k, "q": q, "v": v, "log_alpha": log_alpha, "state K": state_k, "state V": state_v}
    dispatch.check_same_place(op, named)
    if state_k is not None and state_v is not None:
        heads, slots = k.shape[-2], log_alpha.shape[-1]
        dispatch.check_shape(op, "state K", state_k, (sequences, heads, slots, k.shape[-1]), "[N, H, M, D]")
        dispatch.check_shape(op, "state V", state_v, (sequences, heads, slots, v.shape[-1]), "[N, H, M, V]")


def _check_visible(op: str, visible: Tensor | None, k: Tensor) -> None:
    if visible is None:
        return
    dispatch.check_shape(op, "visible", visible, tuple(k.shape[:-2]), "[B, T]" if k.dim() == 4 else "[B]")
    if visible.dtype not in (torch.int32, torch.int64) or visible.device != k.device:
        raise ValueError(f"{op}: visible is {visible.dtype} on {visible.device}, must be int32 on {k.device} like k")


__all__ = ["gsa", "gsa_gates", "gsa_step"]
