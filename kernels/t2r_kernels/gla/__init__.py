"""Gated linear attention: `gla` over sequences, `gla_step` for one decoded token."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from .chunk import gla_chunk
from .naive import gla_naive, gla_step_torch
from .ops import gla_operator

GATES = ("key", "value", "scalar", None)
WIDEST = 256  # D and V of the Triton kernels


def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    gate: str | None = None,
    write: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Gated linear attention (Yang et al., arXiv 2312.06635), causal, one state per key/value head:

        S_t = alpha_t S_{t-1} + write_t (k_t v_t^T),   o_t = scale * q_t S_t

    where alpha and write multiply the rows of S (gate on the key side), its columns (on the value side) or all of it.

    Args:
        q: [B, T, HQ, D]. Query head h reads key/value head h // (HQ // H).
        k: [B, T, H, D].
        v: [B, T, H, V].
        log_decay: log alpha in [-inf, 0], not checked: [B, T, H, D] for gate="key", [B, T, H, V] for gate="value",
            [B, T, H] for gate="scalar"; None for gate=None (plain linear attention).
        gate: "key", "value", "scalar" or None.
        write: optional weights, shaped like log_decay ([B, T, H] without a gate). Gated slot attention is two calls,
            gate="value" with ones for v and then gate="key" with ones for k, both writing with 1 - alpha.
        scale: D ** -0.5 by default.
        initial_state: [N, H, D, V]; zeros by default. N is B, or the number of documents.
        output_final_state: also return the state after the last token, shaped alike.
        cu_seqlens: int32 [N + 1], where each of N documents packed into one row (B = 1) starts and ends; documents may
            be empty and see nothing of each other.
        backend: "auto" (triton on a GPU, torch elsewhere), "naive", "torch" or "triton".

    Returns:
        o [B, T, HQ, V] in q's dtype, and None or the final state in float32 (float64 when q is float64). Gradients flow
        to every tensor argument, from o and the final state.

    Raises:
        ValueError: shapes, devices or cu_seqlens that do not fit, an unknown gate, or a backend that cannot run here.
    """
    dispatch.check_sequences("gla", q, k, v)
    sequences = dispatch.count_sequences("gla", k, cu_seqlens)
    _check_gate("gla", gate, q, k, v, log_decay, write, initial_state, sequences)
    chosen = dispatch.choose("gla", backend, (q, k, v), _too_large(k, v))
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    args = (q, k, v, log_decay, gate, write, scale, initial_state, output_final_state, cu_seqlens)
    # where it is watched torch's path is an operator too
    if chosen == "triton" or (chosen == "torch" and dispatch.watched(q)):
        return gla_operator(*args, chosen)
    with dispatch.without_autocast(q.device):
        return gla_naive(*args) if chosen == "naive" else gla_chunk(*args)


@torch.no_grad()
def gla_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    *,
    gate: str | None = None,
    write: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """One token of `gla` in decoding; the state is updated in place and no gradient is recorded.

    Args:
        q: [B, HQ, D].
        k: [B, H, D].
        v: [B, H, V].
        log_decay: [B, H, D], [B, H, V], [B, H] or None, as `gate` asks.
        state: [B, H, D, V], float32, as `gla` returns it.
        gate: "key", "value", "scalar" or None.
        write: optional weights, shaped like log_decay ([B, H] without a gate).
        scale: D ** -0.5 by default.
        backend: as in `gla`; "naive" and "torch" are the same here.

    Returns:
        o [B, HQ, V] in q's dtype.

    Raises:
        ValueError: shapes or devices that do not fit, an unknown gate, or a backend that cannot run here.
    """
    if k.dim() != 3:
        raise ValueError(f"gla_step: k has shape {tuple(k.shape)}, must be [B, H, D]")
    batch, heads, dim = k.shape
    dispatch.check_shape("gla_step", "q", q, (batch, None, dim), "[B, HQ, D]")
    dispatch.check_shape("gla_step", "v", v, (batch, heads, None), "[B, H, V]")
    dispatch.check_group("gla_step", q.shape[1], heads)
    _check_gate("gla_step", gate, q, k, v, log_decay, write, state, batch)
    scale = dim**-0.5 if scale is None else scale
    chosen = dispatch.choose("gla", backend, (q, k, v, state))
    with dispatch.without_autocast(q.device):
        run = _gla_step_triton if chosen == "triton" else gla_step_torch
        return run(q, k, v, log_decay, state, gate, write, scale)


def _too_large(k: Tensor, v: Tensor) -> str | None:
    """The kernels hold all of one side of the state, so its width is limited."""
    if max(k.shape[-1], v.shape[-1]) <= WIDEST:
        return None
    return f"D and V must be at most {WIDEST}, are {k.shape[-1]} and {v.shape[-1]}"


def _gla_step_triton(*args):
    from .triton import gla_step_triton

    return gla_step_triton(*args)


def _check_gate(
    op: str,
    gate: str | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    write: Tensor | None,
    state: Tensor | None,
    sequences: int,
) -> None:
    if gate not in GATES:
        raise ValueError(f"{op}: gate={gate!r} is not one of 'key', 'value', 'scalar', None")
    if (gate is None) != (log_decay is None):
        raise ValueError(f"{op}: log_decay is {'' if log_decay is None else 'not '}None with gate={gate!r}")
    dispatch.check_same_place(op, {"k": k, "q": q, "v": v, "log_decay": log_decay, "write": write, "state": state})
    tokens, layout = k.shape[:-1], "B, T, H" if k.dim() == 4 else "B, H"
    width, layout = {
        "key": ((k.shape[-1],), f"[{layout}, D]"),
        "value": ((v.shape[-1],), f"[{layout}, V]"),
    }.get(str(gate), ((), f"[{layout}]"))
    for name, x in (("log_decay", log_decay), ("write", write)):
        if x is not None:
            dispatch.check_shape(op, name, x, (*tokens, *width), layout)
    if state is not None:
        dispatch.check_shape(op, "state", state, (sequences, k.shape[-2], k.shape[-1], v.shape[-1]), "[N, H, D, V]")


__all__ = ["gla", "gla_step"]
