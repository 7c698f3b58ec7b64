"""gla and gla_step in Triton, against the recurrent definition in float64.

On a machine without a GPU these run in Triton's interpreter, in float32 and at small sizes, through
`test_triton_interpreter.py`, which sets TRITON_INTERPRET before anything imports triton.
"""

import dataclasses
import os

import pytest
import torch

from t2r_kernels import gla, gla_step

from .cases import DOCUMENTS, compare, reference, run
from .test_gla import SIDES, gla_call, gla_inputs

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="runs on a GPU, or through test_triton_interpreter.py"
)
DEVICE = "cpu" if INTERPRETED else "cuda"
FLOAT32 = 3e-5
FORGOTTEN = 1e-3


def on_device(inputs):
    return {name: x.to(DEVICE) for name, x in inputs.items()}


def check(side, inputs, seed, documents=None, **options):
    want = run(gla_call(side, documents, backend="naive", **options), reference(inputs), seed)
    got = run(gla_call(side, documents, backend="triton", **options), on_device(inputs), seed)
    compare(got, want, FLOAT32)


def one_head(side, gate, seed, **options):
    return gla_inputs(side, gate, seed, batch=1, heads=1, **options)


@pytest.mark.parametrize(
    ("side", "tokens"),
    [(side, n) for side in ("key", "value") for n in (1, 15, 65)] + [("key", 127), ("scalar", 2), ("scalar", 65)],
)
def test_matches_the_definition(side, tokens, seed):
    check(side, one_head(side, "mild", seed, tokens=tokens), seed)


@pytest.mark.parametrize("gate", ["clock", "closed every fourth", "open", "zero every third", "zero"])
@pytest.mark.parametrize("side", SIDES[:3])
def test_every_gate(side, gate, seed):
    check(side, one_head(side, gate, seed, tokens=20), seed)


@pytest.fixture
def factored(monkeypatch):
    """The decays that bf16 takes, in float32, which the interpreter can check."""
    from t2r_kernels.gla.triton import ops

    plan_for = ops.plan_for
    monkeypatch.setattr(ops, "plan_for", lambda *sizes: dataclasses.replace(plan_for(*sizes), factored=True, tile=16))


@pytest.mark.parametrize("tokens", [1, 17, 70])
@pytest.mark.parametrize("side", SIDES[:3])
def test_factored_decays_match_the_definition(factored, side, tokens, seed):
    check(side, one_head(side, "mild", seed, tokens=tokens, group=3), seed)


@pytest.mark.parametrize("gate", ["clock", "closed every fourth", "open", "zero every third", "zero"])
@pytest.mark.parametrize("side", SIDES[:3])
def test_factored_decays_that_forget(factored, side, gate, seed):
    """What a gate forgets is kept at 2^-13 of its weight for pairs within a tile, and no longer."""
    inputs = one_head(side, gate, seed, tokens=35)
    want = run(gla_call(side, None, backend="naive"), reference(inputs), seed)
    got = run(gla_call(side, None, backend="triton"), on_device(inputs), seed)
    compare({"final": got["final"]}, {"final": want["final"]}, FLOAT32)
    compare(got, want, FORGOTTEN)


@pytest.mark.parametrize("documents", ["empty and one-token", "block edges"])
@pytest.mark.parametrize("side", SIDES[:3])
def test_factored_decays_of_packed_documents(factored, side, documents, seed):
    documents = DOCUMENTS[documents]
    check(side, one_head(side, "mild", seed, documents=documents), seed, documents)


@pytest.mark.parametrize(
    ("side", "documents"), [("key", "empty and one-token"), ("value", "block edges"), (None, "longest last")]
)
def test_packed_documents_match_the_definition(side, documents, seed):
    documents = DOCUMENTS[documents]
    check(side, one_head(side, "zero every third", seed, documents=documents), seed, documents)


@pytest.mark.parametrize("group", [1, 3, 12])
@pytest.mark.parametrize("side", ["key", "scalar"])
def test_groups_and_no_write_weight(side, group, seed):
    check(side, one_head(side, "mild", seed, tokens=20, group=group, write=False), seed, scale=1.0)


@pytest.mark.parametrize(
    ("side", "dim_k", "dim_v"), [("key", 40, 80), ("value", 24, 40), ("scalar", 40, 80), (None, 20, 1)]
)
def test_sizes_that_are_no_powers_of_two(side, dim_k, dim_v, seed):
    check(side, one_head(side, "clock", seed, tokens=20, dim_k=dim_k, dim_v=dim_v), seed)


@pytest.mark.parametrize("side", ["key", "value", "scalar"])
def test_every_element_is_written(side, monkeypatch, seed):
    """`torch.empty` full of NaN: what no kernel writes shows."""
    plain = torch.empty

    def poisoned(*args, **kwargs):
        x = plain(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", poisoned)
    documents = (0, 1, 20, 0)
    check(side, one_head(side, "mild", seed, documents=documents), seed, documents)


@pytest.mark.parametrize("side", ["key", "value"])
def test_two_runs_are_bitwise_equal(side, seed):
    inputs = on_device(one_head(side, "mild", seed, tokens=20))
    first, second = (run(gla_call(side, None, backend="triton"), inputs, seed) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("write", [True, False])
@pytest.mark.parametrize("side", SIDES)
def test_a_prefill_in_parts_and_steps_are_the_whole(side, write, seed):
    x = on_device(gla_inputs(side, "zero every third", seed, tokens=25, write=write))
    state = x.pop("state")
    options = {"gate": side, "output_final_state": True, "backend": "triton"}
    whole, final = gla(**x, initial_state=state, **options)
    outputs = []
    for part in (slice(0, 7), slice(7, 20)):
        o, state = gla(**{name: y[:, part] for name, y in x.items()}, initial_state=state, **options)
        outputs.append(o)
    address = state.data_ptr()
    for t in range(20, 25):
        token = {"log_decay": None} | {name: y[:, t] for name, y in x.items()}
        outputs.append(gla_step(**token, state=state, gate=side, backend="triton")[:, None])
    assert address == state.data_ptr()
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(state, final, rtol=1e-4, atol=2e-5)


def test_states_too_wide_are_refused():
    x = torch.zeros(1, 1, 1, 257, device=DEVICE)
    with pytest.raises(ValueError, match="gla: backend='triton' cannot run: D and V must be at most 256, are 257"):
        gla(x, x, x, backend="triton")
