"""Losses on logits, and the head that computes them a chunk of tokens at a time.

The logits of a batch, [B*T, vocabulary] in fp32, are often larger than the model's activations. `head_loss` makes
them for a chunk of tokens, takes loss and gradient, and goes on: no more than one chunk is ever held, and nothing is
computed twice.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
# fp32 logits of one chunk: 256 MB; the loss holds a few such tensors.
_CHUNK_NUMBERS = 1 << 26

ChunkLoss = Callable[[Tensor, slice], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed next-token cross-entropy in nats; logits [N, vocabulary] fp32, labels [N], -100 left out."""
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")


def kl_divergence(student: Tensor, teacher: Tensor, mask: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Summed KL(teacher || student) over the unmasked tokens, in nats, times temperature^2.

    The factor keeps the gradient's size independent of the temperature (Hinton et al., arXiv 1503.02531).

    Args:
        student, teacher: logits [N, vocabulary], fp32.
        mask: [N] bool, True where a token counts.
    """
    log_q = F.log_softmax(student / temperature, dim=-1)
    log_p = F.log_softmax(teacher / temperature, dim=-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    return divergence.masked_fill(~mask, 0.0).sum() * temperature**2


def top_k_kl_divergence(student: Tensor, teacher: Tensor, mask: Tensor, *, k: int, temperature: float = 1.0) -> Tensor:
    """As `kl_divergence`, between distributions over k + 1 outcomes: the teacher's k likeliest tokens and all others.

    The last outcome keeps the student's mass outside the k tokens equal to the teacher's; without it the student
    learns to be surer than the teacher.
    """
    top, tokens = teacher.topk(k, dim=-1, sorted=False)
    log_p = _with_rest(teacher / temperature, top / temperature, tokens)
    log_q = _with_rest(student / temperature, student.gather(-1, tokens) / temperature, tokens)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    return divergence.masked_fill(~mask, 0.0).sum() * temperature**2


def _with_rest(logits: Tensor, chosen: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities [N, k + 1] of the chosen tokens and of all others together."""
    rest = logits.scatter(-1, tokens, float("-inf")).logsumexp(-1, keepdim=True)
    return F.log_softmax(torch.cat([chosen, rest], dim=-1), dim=-1)


def head_loss(hidden: Tensor, weight: Tensor, loss: ChunkLoss) -> Tensor:
    """The summed loss of a language-model head, differentiable in `hidden` and `weight`.

    Args:
        hidden: [N, hidden], the last hidden states.
        weight: [vocabulary, hidden], the head's weight.
        loss: from fp32 logits [n, vocabulary] of a slice of the tokens, and that slice, to their summed loss.
    """
    dtype = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else None
    return _HeadLoss.apply(hidden, weight, loss, dtype or hidden.dtype)


def chunks(tokens: int, vocabulary: int) -> list[slice]:
    """Slices of the tokens whose logits are made together."""
    size = max(1, _CHUNK_NUMBERS // vocabulary)
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


class _HeadLoss(torch.autograd.Function):
    """Loss and both gradients in the forward pass; the backward pass scales them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, loss: ChunkLoss, dtype: torch.dtype) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        total = hidden.new_zeros((), dtype=torch.float32)
        hidden_gradient = torch.empty_like(hidden) if need_hidden else None
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        with torch.autocast(hidden.device.type, enabled=False):
            w = weight.to(dtype)
            for part in chunks(hidden.shape[0], weight.shape[0]):
                h = hidden[part].to(dtype)
                logits = (h @ w.T).float()
                if not (need_hidden or need_weight):
                    total += loss(logits, part)
                    continue
                logits.requires_grad_()
                with torch.enable_grad():
                    value = loss(logits, part)
                (gradient,) = torch.autograd.grad(value, logits)
                total += value.detach()
                gradient = gradient.to(dtype)
                if hidden_gradient is not None:
                    hidden_gradient[part] = gradient @ w
                if weight_gradient is not None:
                    weight_gradient += gradient.T @ h
        ctx.hidden_gradient, ctx.weight_gradient = hidden_gradient, weight_gradient
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (scale,) = upstream
        hidden, weight = ctx.hidden_gradient, ctx.weight_gradient
        ctx.hidden_gradient = ctx.weight_gradient = None
        return (
            None if hidden is None else hidden.mul_(scale.to(hidden.dtype)),
            None if weight is None else weight.mul_(scale).to(ctx.weight_dtype),
            None,
            None,
        )
