"""gsa_gates in Triton against its definition in float64; in Triton's interpreter where there is no GPU."""

import os

import pytest
import torch

from t2r_kernels import gsa_gates

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="runs on a GPU, or through test_triton_interpreter.py"
)
DEVICE = "cpu" if INTERPRETED else "cuda"
BATCH, TOKENS, HEADS = 2, 300, 3


def draw(slots, seed, dtype=torch.float32, spread=6.0):
    generator = torch.Generator().manual_seed(seed)
    gate = spread * torch.randn(BATCH, TOKENS, HEADS, slots, generator=generator)
    bias, amplitude = (torch.randn(HEADS, slots, generator=generator) for _ in range(2))
    start = torch.randint(0, 40, (BATCH, 1), generator=generator)
    position = torch.arange(TOKENS) - start  # a document begins inside the row
    position = torch.where(position < 0, position + start, position)
    mask = torch.rand(BATCH, TOKENS, generator=generator) < 0.8
    return [x.to(DEVICE) for x in (gate.to(dtype), bias, 8 * amplitude, position, mask)]


def check(leaves, options, tolerance):
    """Value and gradients against float64, element by element: relative, for log alpha near 0 matters as it is."""
    names, tensors = list(leaves), [x.requires_grad_() for x in leaves.values()]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    got = gsa_gates(**dict(zip(names, tensors, strict=True)), **options, backend="triton")
    want = gsa_gates(**dict(zip(names, exact, strict=True)), **options, backend="naive")
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=0)  # exp of a rounded sum up to 100
    upstream = torch.randn(*got.shape, 2, device=got.device)[..., 0]
    got_grad, want_grad = (
        torch.autograd.grad(torch.where(y.isfinite(), y, 0.0), x, upstream.to(y.dtype))
        for y, x in ((got, tensors), (want, exact))
    )
    for name, mine, other in zip(names, got_grad, want_grad, strict=True):
        assert mine.dtype == leaves[name].dtype
        torch.testing.assert_close(mine.double(), other, rtol=tolerance, atol=tolerance * other.abs().max().item())


@pytest.mark.parametrize(("slots", "sinks", "ring"), [(5, 2, 3), (33, 4, 20), (16, 16, 0), (16, 0, 16)])
@pytest.mark.parametrize("masked", [False, True])
def test_clock(slots, sinks, ring, masked, seed):
    gate, bias, amplitude, position, mask = draw(slots, seed)
    options = {"position": position, "sinks": sinks, "ring": ring, "mask": mask if masked else None}
    check({"gate": gate, "bias": bias, "amplitude": amplitude}, options, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16, torch.float16])
def test_paper(dtype, seed):
    gate, *_, mask = draw(20, seed, dtype)
    check({"gate": gate}, {"tau": 8.0, "mask": mask}, 1e-5 if dtype == torch.float32 else 1e-2)


def test_gates_that_are_wide_open_or_shut(seed):
    gate = draw(16, seed)[0].sign() * torch.tensor([0.0, 1e-3, 12.0, 16.0, 40.0, 80.0, 1e4, torch.inf] * 2).to(DEVICE)
    check({"gate": gate}, {}, 1e-5)


def test_two_runs_are_bitwise_equal(seed):
    gate, bias, amplitude, position, mask = draw(33, seed)
    leaves = [x.requires_grad_() for x in (gate, bias, amplitude)]

    def gradients():
        options = {"position": position, "sinks": 4, "ring": 29, "mask": mask, "backend": "triton"}
        y = gsa_gates(gate, bias=bias, amplitude=amplitude, **options)
        return torch.autograd.grad(y.clamp(min=-1e4).sum(), leaves)

    assert all(torch.equal(*pair) for pair in zip(gradients(), gradients(), strict=True))
