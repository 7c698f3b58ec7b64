"""gsa in Triton with more slots than a program holds: pieces of slots, on a GPU in bf16 (most on the fast path).

`test_triton_gsa_walk.py` runs the same kernels in Triton's interpreter, in pieces of 16 and 32 slots.
"""

import pytest
import torch

from t2r_kernels import gsa

from .cases import DOCUMENTS, GATES, compare, gsa_call, gsa_inputs, reference, run, some_visible

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
TOLERANCE = 1.5e-2
SIZES = {"dim_k": 128, "dim_v": 128, "group": 4, "heads": 1, "batch": 1}


def check(inputs, seed, documents=None, visible=None):
    """Against float64 on the CPU: token after token it is faster there."""
    want = run(gsa_call(gsa, documents, backend="naive", visible=visible), reference(inputs), seed)
    inputs = {name: x.cuda() for name, x in inputs.items()}
    compare(run(gsa_call(gsa, documents, backend="triton", visible=visible), inputs, seed), want, TOLERANCE)


def draw(gate, seed, tokens, **sizes):
    return gsa_inputs(gate, seed, tokens=tokens, dtype=torch.bfloat16, **(SIZES | sizes))


@pytest.mark.parametrize("slots", [65, 96, 100, 128, 192, 216, 256, 320, 512, 1000, 1024])
def test_slots(slots, seed):
    check(draw("mild", seed, 131, slots=slots), seed)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("slots", [96, 130])
def test_gates(slots, gate, seed):
    check(draw(gate, seed, 333, slots=slots), seed)


@pytest.mark.parametrize(
    ("dim_k", "dim_v", "group", "slots"),
    [(64, 64, 4, 256), (64, 64, 8, 256), (80, 96, 3, 100), (256, 256, 4, 96), (128, 128, 1, 128), (128, 64, 8, 128),
     (128, 128, 7, 192), (16, 80, 2, 300), (64, 64, 20, 100), (128, 128, 12, 130)],
)  # fmt: skip
def test_widths_and_groups(dim_k, dim_v, group, slots, seed):
    check(draw("mild", seed, 127, dim_k=dim_k, dim_v=dim_v, group=group, slots=slots, heads=2, batch=2), seed)


@pytest.mark.parametrize("limit", ["random", "written"])
@pytest.mark.parametrize("slots", [128, 200, 1000])
def test_slots_that_cannot_be_seen(slots, limit, seed):
    check(draw("mild", seed, 150, slots=slots, batch=2), seed, visible=some_visible(limit, seed, 150, None, slots))


@pytest.mark.parametrize("limit", [None, "written"])
@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
def test_packed_documents(documents, limit, seed):
    visible = None if limit is None else some_visible(limit, seed, 0, documents, 136)
    check(draw("clock", seed, 0, documents=documents, slots=136, heads=2), seed, documents, visible)


def test_several_segments(seed):
    check(draw("mild", seed, 400, slots=96, heads=2), seed)


def test_without_states(seed):
    x = draw("mild", seed, 100, slots=160, heads=2)
    leaves = {name: x[name] for name in ("q", "k", "v", "log_alpha")}
    want = run(lambda **x: {"o": gsa(**x, backend="naive")[0]}, reference(leaves), seed)
    leaves = {name: y.cuda() for name, y in leaves.items()}
    compare(run(lambda **x: {"o": gsa(**x, backend="triton")[0]}, leaves, seed), want, TOLERANCE)


@pytest.mark.parametrize("documents", [None, (0, 1, 90, 36)])
def test_every_element_is_written(documents, monkeypatch, seed):
    """`torch.empty` full of NaN: what no kernel writes shows."""
    plain = torch.empty

    def poisoned(*args, **kwargs):
        x = plain(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", poisoned)
    check(draw("mild", seed, 127, documents=documents, slots=100, group=3, heads=2), seed, documents)


def test_small_for_a_sanitizer(seed):
    """Every kernel of both paths in pieces, few tokens: what compute-sanitizer can go through in a minute."""
    for dtype in (torch.bfloat16, torch.float32):
        x = gsa_inputs("mild", seed, documents=(0, 1, 20), heads=1, dim_k=128, dim_v=128, slots=100, dtype=dtype)
        got = run(gsa_call(gsa, (0, 1, 20), backend="triton"), {name: y.cuda() for name, y in x.items()}, seed)
        assert all(y.isfinite().all() for y in got.values())


def test_two_runs_are_bitwise_equal(seed):
    inputs = {name: x.cuda() for name, x in draw("mild", seed, 700, slots=192, heads=8, batch=2).items()}
    first, second = (run(gsa_call(gsa, None, backend="triton"), inputs, seed) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
