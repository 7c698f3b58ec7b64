"""From the logits of the gates, and the clock, to log alpha."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch


def gsa_gates(
    gate: Tensor,
    *,
    bias: Tensor | None = None,
    amplitude: Tensor | None = None,
    position: Tensor | None = None,
    sinks: int = 0,
    ring: int = 0,
    tau: float = 1.0,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """log alpha = logsigmoid(gate + bias + amplitude * clock) / tau, in one pass on a GPU.

    Args:
        gate: logits [B, T, H, M] in any floating dtype, which float32 arithmetic takes from there.
        bias: [H, M], added to the logits.
        amplitude: [H, M], times the clock (see `clock`) added to the logits; needs `position`.
        position: integers [B, T], how many tokens of its sequence came before each token. With it the first token of
            every sequence (position 0) gets log alpha = -inf: it fills every slot.
        sinks: slots that the clock leaves to the first tokens.
        ring: slots that it goes around after that; sinks + ring <= M.
        tau: divisor of the logarithm (the paper's damping).
        mask: bool [B, T], False where a token is padding: log alpha = 0, which leaves the state as it is.
        backend: as in `gsa`; "naive" and "torch" are the same here.

    Returns:
        log alpha [B, T, H, M] in float32 (float64 when gate is float64). Gradients flow to gate, bias and amplitude.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a backend that cannot run here.
    """
    if gate.dim() != 4:
        raise ValueError(f"gsa_gates: gate has shape {tuple(gate.shape)}, must be [B, T, H, M]")
    batch, tokens, heads, slots = gate.shape
    dispatch.check_same_place("gsa_gates", {"gate": gate, "bias": bias, "amplitude": amplitude})
    for name, x in (("bias", bias), ("amplitude", amplitude)):
        if x is not None:
            dispatch.check_shape("gsa_gates", name, x, (heads, slots), "[H, M]")
    for name, x in (("position", position), ("mask", mask)):
        if x is not None:
            dispatch.check_shape("gsa_gates", name, x, (batch, tokens), "[B, T]")
    if amplitude is not None and position is None:
        raise ValueError("gsa_gates: amplitude is given, so position must be too")
    if sinks < 0 or ring < 0 or sinks + ring > slots:
        raise ValueError(f"gsa_gates: sinks {sinks} + ring {ring} must be at most the {slots} slots of gate")
    if dispatch.choose("gsa", backend, (gate,)) == "triton":
        return _gates_triton(gate, bias, amplitude, position, mask, sinks, ring, tau)
    return gates_torch(gate, bias, amplitude, position, mask, sinks, ring, tau)


def gates_torch(
    gate: Tensor,
    bias: Tensor | None,
    amplitude: Tensor | None,
    position: Tensor | None,
    mask: Tensor | None,
    sinks: int,
    ring: int,
    tau: float,
) -> Tensor:
    """The definition. Shapes as in `gsa_gates`."""
    x = gate.to(torch.promote_types(gate.dtype, torch.float32))
    if bias is not None:
        x = x + bias.to(x.dtype)
    if amplitude is not None:
        assert position is not None
        beat = clock(position, x.shape[-1], sinks, ring)[:, :, None]
        x = x + amplitude.to(x.dtype) * beat.to(x.dtype)
    log_alpha = F.logsigmoid(x)
    if tau != 1.0:
        log_alpha = log_alpha / tau
    if position is not None:
        log_alpha = log_alpha.masked_fill(position[:, :, None, None] == 0, -torch.inf)
    return log_alpha if mask is None else log_alpha.masked_fill(~mask[:, :, None, None], 0.0)


def clock(position: Tensor, slots: int, sinks: int, ring: int) -> Tensor:
    """[B, T, M] float32 from position [B, T]: -1 in the slot that a token writes, +1 elsewhere in sinks and ring, 0 in
    the slots beyond them."""
    slot = torch.arange(slots, device=position.device)
    beat = torch.where(slot == written_slot(position, sinks, ring)[..., None], -1.0, 1.0)
    return torch.where(slot < sinks + ring, beat, 0.0)


def written_slot(position: Tensor, sinks: int, ring: int) -> Tensor:
    """The slot that each token writes: its own while there are sinks left, then around the ring; without a ring, none
    (slot number `sinks`)."""
    around = (position - sinks) % ring if ring else 0
    return torch.where(position < sinks, position, sinks + around)


def _gates_triton(*args):
    from .triton import gates_triton

    return gates_triton(*args)
