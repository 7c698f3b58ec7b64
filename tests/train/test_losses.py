"""Losses against formulas written out by hand in float64, and the chunked head against the dense one."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from t2r.train import losses
from t2r.train.losses import cross_entropy, head_loss, kl_divergence, top_k_kl_divergence

N, V, HIDDEN = 7, 11, 5


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(N, V, dtype=torch.float64) * 2, torch.randn(N, V, dtype=torch.float64) * 2


MASK = torch.tensor([True, True, False, True, True, False, True])


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_is_the_dense_formula_without_masked_tokens(logits: tuple[Tensor, Tensor], temperature: float) -> None:
    student, teacher = logits
    expected = 0.0
    for n in range(N):
        if MASK[n]:
            p = [math.exp(x / temperature) for x in teacher[n].tolist()]
            q = [math.exp(x / temperature) for x in student[n].tolist()]
            p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
            expected += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) * temperature**2
    assert kl_divergence(student, teacher, MASK, temperature=temperature).item() == pytest.approx(expected, rel=1e-12)


def test_masked_tokens_give_no_gradient_even_when_they_are_not_finite(logits: tuple[Tensor, Tensor]) -> None:
    student, teacher = logits
    teacher[2] = float("inf")
    student.requires_grad_()
    value = kl_divergence(student, teacher, MASK)
    assert value.isfinite()
    clean = student.detach().clone().requires_grad_()
    finite = teacher.clone()
    finite[2] = 0.0
    assert value.item() == kl_divergence(clean, finite, MASK).item()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("k", [1, 4, V - 1])
def test_top_k_kl_is_the_formula_over_k_tokens_and_the_rest(
    logits: tuple[Tensor, Tensor], k: int, temperature: float
) -> None:
    student, teacher = logits
    expected = 0.0
    for n in range(N):
        if MASK[n]:
            p, q = (F.softmax(x[n] / temperature, dim=0) for x in (teacher, student))
            chosen = sorted(range(V), key=lambda v, p=p: -p[v].item())[:k]
            pairs = [(p[v].item(), q[v].item()) for v in chosen]
            pairs.append((1 - sum(a for a, _ in pairs), 1 - sum(b for _, b in pairs)))
            expected += sum(a * math.log(a / b) for a, b in pairs) * temperature**2
    value = top_k_kl_divergence(student, teacher, MASK, k=k, temperature=temperature)
    assert value.item() == pytest.approx(expected, rel=1e-9)
    full = kl_divergence(student, teacher, MASK, temperature=temperature)
    assert value <= full + 1e-12
    if k == V - 1:  # the rest is a single token: nothing was merged
        assert value.item() == pytest.approx(full.item(), rel=1e-9)


def test_both_divergences_vanish_at_the_teacher(logits: tuple[Tensor, Tensor]) -> None:
    _, teacher = logits
    for loss in (kl_divergence, lambda s, t, m: top_k_kl_divergence(s, t, m, k=3)):
        student = teacher.clone().requires_grad_()
        value = loss(student, teacher, MASK)
        assert abs(value.item()) < 1e-12
        (gradient,) = torch.autograd.grad(value, student)
        assert gradient.abs().max() < 1e-12


LABELS = torch.tensor([3, -100, 5, 0, -100, 10, 2])
CHUNK_LOSSES: dict[str, Callable[[Tensor, Tensor], Callable[[Tensor, slice], Tensor]]] = {
    "ce": lambda teacher, labels: lambda x, at: cross_entropy(x, labels[at]),
    "kl": lambda teacher, labels: lambda x, at: kl_divergence(x, teacher[at].to(x.dtype), MASK[at]),
    "both": lambda teacher, labels: (
        lambda x, at: (
            top_k_kl_divergence(x, teacher[at].to(x.dtype), MASK[at], k=3) + 0.3 * cross_entropy(x, labels[at])
        )
    ),
}


@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("name", CHUNK_LOSSES)
def test_the_chunked_head_equals_the_dense_one(
    monkeypatch: pytest.MonkeyPatch, logits: tuple[Tensor, Tensor], name: str, rows: int
) -> None:
    monkeypatch.setattr(losses, "_CHUNK_NUMBERS", rows * V)
    torch.manual_seed(3)
    hidden = torch.randn(N, HIDDEN, requires_grad=True)
    weight = torch.randn(V, HIDDEN, requires_grad=True)
    loss = CHUNK_LOSSES[name](logits[1].float(), LABELS)
    dense = loss(hidden @ weight.T, slice(0, N))
    expected = torch.autograd.grad(dense * 0.5, (hidden, weight))
    value = head_loss(hidden, weight, loss)
    found = torch.autograd.grad(value * 0.5, (hidden, weight))
    torch.testing.assert_close(value, dense, rtol=1e-5, atol=1e-6)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["ce", "kl", "top-k"])
def test_no_more_than_a_chunk_of_logits_is_ever_made(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, rows, vocabulary = 64, 5, 501
    monkeypatch.setattr(losses, "_CHUNK_NUMBERS", rows * vocabulary)
    labels, mask = torch.randint(vocabulary, (tokens,)), torch.ones(tokens, dtype=torch.bool)
    hidden, weight = (
        torch.randn(tokens, HIDDEN, requires_grad=True),
        torch.randn(vocabulary, HIDDEN, requires_grad=True),
    )
    teacher, head = torch.randn(tokens, HIDDEN), torch.randn(vocabulary, HIDDEN)
    sizes: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))
            return result

    def loss(logits: Tensor, part: slice) -> Tensor:
        if name == "ce":
            return cross_entropy(logits, labels[part])
        target = teacher[part] @ head.T
        if name == "kl":
            return kl_divergence(logits, target, mask[part])
        return top_k_kl_divergence(logits, target, mask[part], k=3)

    with Sizes():
        head_loss(hidden, weight, loss).backward()
    assert max(sizes) == max(rows * vocabulary, vocabulary * HIDDEN)


def test_the_head_makes_only_the_gradients_that_are_needed() -> None:
    hidden, weight = torch.randn(N, HIDDEN, requires_grad=True), torch.randn(V, HIDDEN)
    head_loss(hidden, weight, lambda x, at: cross_entropy(x, LABELS[at])).backward()
    assert hidden.grad is not None
    assert weight.grad is None
    with torch.no_grad():
        assert not head_loss(hidden, weight, lambda x, at: cross_entropy(x, LABELS[at])).requires_grad


def test_under_autocast_the_head_multiplies_in_bf16_and_sums_in_fp32() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, HIDDEN, requires_grad=True), torch.randn(V, HIDDEN, requires_grad=True)
    seen = []

    def loss(x: Tensor, at: slice) -> Tensor:
        seen.append(x.dtype)
        return cross_entropy(x, LABELS[at])

    with torch.autocast("cpu", torch.bfloat16):
        value = head_loss(hidden, weight, loss)
    value.backward()
    assert seen == [torch.float32]
    assert value.dtype == torch.float32
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    expected = cross_entropy((hidden.bfloat16() @ weight.bfloat16().T).float(), LABELS)
    torch.testing.assert_close(value, expected)
