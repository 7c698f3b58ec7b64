"""What every backend of gsa and gla is tested on, and how its results are compared.

A test draws inputs in the dtype it tests, runs a backend on them, and compares outputs, final states and every gradient
with the recurrent definition in float64 on the same numbers: `compare(run(...), run(reference(...)))`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

LENGTHS = (1, 2, 15, 63, 64, 65, 127)
LONG = (1000, 4097)
DOCUMENTS = {  # lengths of the documents packed into one row
    "empty and one-token": (0, 1, 0, 0, 5, 1, 64, 0, 33, 1, 0),
    "block edges": (16, 32, 15, 17, 48),
    "one": (70,),
    "longest last": (1, 2, 90),
}
GATES = ("mild", "clock", "closed every fourth", "open", "zero every third", "zero")


def log_gate(kind: str, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """log alpha [B, T, ...] of one kind. "clock" are logits of +-12, "zero" is log alpha = -inf, "open" alpha = 1."""
    logits = torch.randn(shape, generator=generator, dtype=dtype)
    if kind == "mild":
        return logsigmoid(logits + 3)
    if kind == "clock":
        return logsigmoid(torch.where(logits < -0.5, -12.0, 12.0).to(dtype) + logits / 10)
    if kind == "open":
        return torch.zeros(shape, dtype=dtype)
    if kind == "zero":
        return torch.full(shape, -torch.inf, dtype=dtype)
    gate = logsigmoid(logits + 3)
    if kind == "closed every fourth":
        gate[:, ::4] = -1e4
    else:
        assert kind == "zero every third", kind
        gate[:, 1::3] = -torch.inf
    return gate


def bounds(lengths: tuple[int, ...] | None) -> Tensor | None:
    """cu_seqlens of documents of these lengths."""
    return None if lengths is None else torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def draw(shapes: dict[str, tuple[int, ...]], gates: dict[str, str], seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors by name: normal, or for names in `gates` a log gate of that kind, in float32 unless dtype is float64."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for name, shape in shapes.items():
        if name in gates:
            gate_dtype = torch.promote_types(dtype, torch.float32)
            drawn[name] = log_gate(gates[name], shape, generator, gate_dtype)
        else:
            drawn[name] = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return drawn


def gsa_inputs(
    gate: str,
    seed: int,
    *,
    tokens: int = 0,
    documents: tuple[int, ...] | None = None,
    batch: int = 2,
    heads: int = 2,
    group: int = 2,
    dim_k: int = 8,
    dim_v: int = 12,
    slots: int = 5,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """q, k, v, log_alpha and initial states K and V (never below float32) for `gsa`."""
    if documents is not None:
        batch, tokens = 1, sum(documents)
    n = batch if documents is None else len(documents)
    shapes: dict[str, tuple[int, ...]] = {
        "q": (batch, tokens, heads * group, dim_k),
        "k": (batch, tokens, heads, dim_k),
        "v": (batch, tokens, heads, dim_v),
        "log_alpha": (batch, tokens, heads, slots),
        "K": (n, heads, slots, dim_k),
        "V": (n, heads, slots, dim_v),
    }
    inputs = draw(shapes, {"log_alpha": gate}, seed, dtype)
    at_least_float32 = torch.promote_types(dtype, torch.float32)
    return inputs | {name: inputs[name].to(at_least_float32) for name in ("K", "V")}


def some_visible(kind: str, seed: int, tokens: int, documents: tuple[int, ...] | None, slots: int) -> Tensor:
    """visible [B, T] for `gsa`: "random" in [1, M], or "written" = min(t + 1, M), t counted within each document."""
    batch, lengths = (2, (tokens,)) if documents is None else (1, documents)
    if kind == "random":
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(1, slots + 1, (batch, sum(lengths)), generator=generator, dtype=torch.int32)
    assert kind == "written", kind
    written = torch.cat([torch.arange(1, n + 1) for n in lengths]).clamp(max=slots)
    return written.to(torch.int32).expand(batch, -1)


def reference(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same numbers in float64."""
    return {name: x.detach().double() for name, x in inputs.items()}


def run(call: Callable[..., dict[str, Tensor]], inputs: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """call(**inputs) -> outputs by name; returns them with the gradient of every input, as "d <name>".

    The upstream gradients are normal, the same for every call that gives outputs of these shapes, and non-contiguous.
    On a GPU it is done twice, the second time with the launches of the first repeated, and must be bitwise the same.
    """
    results = _run(call, inputs, seed)
    if next(iter(results.values())).is_cuda:
        again = _run(call, inputs, seed)
        assert all(torch.equal(again[name], x) for name, x in results.items())
    return results


def _run(call: Callable[..., dict[str, Tensor]], inputs: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    outputs = call(**leaves)
    generator = torch.Generator().manual_seed(seed + 1)
    upstream = []
    for x in outputs.values():
        drawn = torch.randn(*x.shape[::-1], 2, generator=generator, dtype=torch.float64)[..., 0]
        upstream.append(drawn.permute(*range(x.dim() - 1, -1, -1)).to(x.device, x.dtype))
        assert x.numel() < 2 or not upstream[-1].is_contiguous() or max(x.shape) == x.numel()
    gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), upstream)
    results = outputs | {f"d {name}": d for name, d in zip(leaves, gradients, strict=True)}
    return {name: x.detach() for name, x in results.items()}


def gsa_call(op: Callable[..., Any], documents: tuple[int, ...] | None, **options: Any) -> Callable[..., dict]:
    """`gsa` with both states as a function for `run`."""
    options |= {"cu_seqlens": bounds(documents), "output_final_state": True}

    def call(q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, K: Tensor, V: Tensor) -> dict[str, Tensor]:
        here = {name: x.to(q.device) if isinstance(x, Tensor) else x for name, x in options.items()}
        o, (final_k, final_v) = op(q, k, v, log_alpha, initial_state=(K, V), **here)
        return {"o": o, "final K": final_k, "final V": final_v}

    return call


def compare(
    got: dict[str, Tensor],
    want: dict[str, Tensor],
    tolerance: float,
    baseline: dict[str, Tensor] | None = None,
    sizes: dict[str, Tensor] | None = None,
) -> None:
    """Each tensor agrees with its float64 value, as a whole and in every row (a ratio of norms hides one wrong row).

    A row may err by `tolerance` times the sum of its own norm, that of the average row, and 0.5: inputs are of size 1,
    and a gradient that cancels to zero keeps the rounding of its terms. Of q, where all slots are equal, these are
    scale p (do . v) k for each slot, whose write weights bf16 rounds slot by slot: 5e-3 where do . v is 25, and in 20
    draws of 30,000 rows the worst needed 0.29. With a `baseline` (plain torch in the dtype that is tested) a row may
    err by twice the baseline's error in it on top.
    `sizes` are the norms that rows are measured by where they are not their own: of what is summed in them.
    """
    assert got.keys() == want.keys()
    for name, expected in want.items():
        x = got[name].detach().double().cpu()
        assert x.shape == expected.shape, name
        assert torch.isfinite(x).all(), f"{name} is not finite"
        error = (x - expected).norm(dim=-1)
        size = (sizes or {}).get(name, expected.norm(dim=-1))
        typical = size.square().mean().sqrt()
        allowed = tolerance * (size + typical + 0.5)
        allowed_norm = tolerance * (size.norm() + 0.1 * size.numel() ** 0.5)
        if baseline is not None:
            base = baseline[name].detach().double().cpu() - expected
            allowed, allowed_norm = allowed + 2 * base.norm(dim=-1), allowed_norm + 2 * base.norm()
        whole = (error.norm() / allowed_norm).item()
        assert whole <= 1, f"{name}: error {whole:.2f} times what is allowed, in norm"
        row = int((error / allowed).argmax())
        worst = (error / allowed).flatten()[row].item()
        assert worst <= 1, f"{name}: error {worst:.2f} times what is allowed in row {row} of {tuple(x.shape)}"
