"""gsa and gla in bf16 in Triton's interpreter, made to compute bf16 as a GPU does (`bf16.py`): the paths that dispatch
takes for bf16, with their own factors, roundings and ranges of exponents. On a GPU `test_triton_gpu.py` and its
neighbours do the same at the sizes of real heads."""

import functools
import os

import pytest
import torch

from t2r_kernels import gla, gsa

from . import bf16
from .cases import GATES, compare, gsa_call, gsa_inputs, reference, run, some_visible
from .test_gla import SIDES, gla_call, gla_inputs

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="runs through test_triton_interpreter.py"
)
TOLERANCE = 1.5e-2


@pytest.fixture(autouse=True)
def bf16_as_on_a_gpu(monkeypatch):
    bf16.install(monkeypatch)


@triton.jit
def product_kernel(x, y, z, w, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    a, b = tl.load(x + at), tl.load(y + at)
    tl.store(z + at, tl.dot(a, b))
    tl.store(w + at, a * b + a)


def test_products_and_rounding_are_those_of_torch(seed):
    torch.manual_seed(seed)
    x, y = (torch.randn(16, 16).bfloat16() for _ in range(2))
    z, w = torch.empty(16, 16), torch.empty(16, 16, dtype=torch.bfloat16)
    product_kernel[(1,)](x, y, z, w, 16)
    torch.testing.assert_close(z, x.float() @ y.float())
    assert torch.equal(w, x * y + x)


def check(inputs, seed, documents=None, visible=None):
    want = run(gsa_call(gsa, documents, backend="naive", visible=visible), reference(inputs), seed)
    compare(run(gsa_call(gsa, documents, backend="triton", visible=visible), inputs, seed), want, TOLERANCE)


def draw(gate, seed, tokens=0, **sizes):
    sizes = {"heads": 1, "group": 4, "dim_k": 32, "dim_v": 16, "slots": 16} | sizes
    return gsa_inputs(gate, seed, tokens=tokens, dtype=torch.bfloat16, **sizes)


@pytest.mark.parametrize("gate", GATES)
def test_gates(gate, seed):
    check(draw(gate, seed, 83), seed)


@pytest.mark.parametrize(("tokens", "group"), [(1, 4), (16, 8), (130, 1), (49, 3)])
def test_lengths_and_groups(tokens, group, seed):
    check(draw("mild", seed, tokens, group=group), seed)


def test_packed_documents(seed):
    check(draw("clock", seed, documents=(0, 1, 40, 17)), seed, (0, 1, 40, 17))


def test_slots_that_cannot_be_seen(seed):
    check(draw("mild", seed, 40), seed, visible=some_visible("written", seed, 40, None, 16))


def errors_under_a_clock(operation, slots, tokens, amplitude, seed):
    """Of the gradients of a ring's logits, against each of them: where it writes, and elsewhere. Without the first
    token, whose gate of gla has an empty state before it."""
    inputs = {name: x for name, x in draw("mild", seed, tokens, batch=1).items() if name in ("q", "k", "v")}
    written = torch.arange(slots) == (torch.arange(tokens) % slots)[:, None]
    noise = torch.randn(1, tokens, 1, slots, generator=torch.Generator().manual_seed(seed))
    logits = torch.where(written[None, :, None], -amplitude, amplitude) + noise

    def gradient(dtype, backend):
        x = logits.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        o, _ = operation(*(y.to(dtype) for y in inputs.values()), torch.nn.functional.logsigmoid(x), backend=backend)
        upstream = torch.randn(o.shape, generator=torch.Generator().manual_seed(seed + 1)).to(torch.bfloat16)
        return torch.autograd.grad(o, x, upstream.to(dtype))[0].double()

    want = gradient(torch.float64, "naive")
    errors = ((gradient(torch.bfloat16, "triton") - want).abs() / want.abs())[0, 1:, 0]
    return errors[written[1:]], errors[~written[1:]]


@pytest.mark.parametrize("amplitude", [8.0, 20.0])
def test_gates_of_a_clock_get_their_small_gradients(amplitude, seed):
    """2^-12 to 2^-29 of the terms that they are sums of, here entry by entry."""
    for errors in errors_under_a_clock(gsa, 16, 64, amplitude, seed):
        assert errors.median() < 1e-2
        assert errors.quantile(0.9) < 8e-2


@pytest.mark.parametrize(("gate", "width"), [("key", 32), ("value", 16)])
def test_gates_of_gla_get_their_small_gradients(gate, width, seed):
    """Down to 2^-12: where a tile is left gla's decays are fp16."""
    for errors in errors_under_a_clock(functools.partial(gla, gate=gate), width, 256, 8.0, seed):
        assert errors.median() < 1e-2
        assert errors.quantile(0.9) < 4e-2


@pytest.mark.parametrize("side", SIDES)
def test_gla(side, seed):
    sizes = {"batch": 1, "heads": 1, "group": 4, "dim_k": 32, "dim_v": 32, "dtype": torch.bfloat16}
    inputs = gla_inputs(side, "mild", seed, tokens=40, **sizes)
    want = run(gla_call(side, None, backend="naive"), reference(inputs), seed)
    compare(run(gla_call(side, None, backend="triton"), inputs, seed), want, TOLERANCE)
