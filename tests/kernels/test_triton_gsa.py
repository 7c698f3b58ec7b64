"""gsa and gsa_step in Triton, against the recurrent definition in float64.

On a machine without a GPU these run in Triton's interpreter, in float32 and at small sizes, through
`test_triton_interpreter.py`, which sets TRITON_INTERPRET before anything imports triton.
"""

import os
from importlib import import_module

import pytest
import torch

from t2r_kernels import gsa, gsa_step

from .cases import DOCUMENTS, GATES, LENGTHS, compare, gsa_call, gsa_inputs, reference, run, some_visible

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="runs on a GPU, or through test_triton_interpreter.py"
)
DEVICE = "cpu" if INTERPRETED else "cuda"
FLOAT32 = 3e-5


def on_device(inputs):
    return {name: x.to(DEVICE) for name, x in inputs.items()}


def check(inputs, seed, documents=None, tolerance=FLOAT32, **options):
    want = run(gsa_call(gsa, documents, backend="naive", **options), reference(inputs), seed)
    compare(run(gsa_call(gsa, documents, backend="triton", **options), on_device(inputs), seed), want, tolerance)


@pytest.mark.parametrize(("tokens", "gate"), [(n, "mild") for n in LENGTHS] + [(34, gate) for gate in GATES])
def test_matches_the_definition(tokens, gate, seed):
    check(gsa_inputs(gate, seed, tokens=tokens, batch=1), seed)


@pytest.mark.parametrize("gate", ["zero every third"])
@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
def test_packed_documents_match_the_definition(documents, gate, seed):
    check(gsa_inputs(gate, seed, documents=documents), seed, documents)


@pytest.mark.parametrize("group", [1, 3, 12])
def test_groups(group, seed):
    check(gsa_inputs("mild", seed, tokens=66 if group == 1 else 20, batch=1, heads=1, group=group), seed)


@pytest.mark.parametrize(("dim_k", "dim_v", "slots"), [(40, 24, 16), (80, 96, 20), (16, 80, 33)])
def test_sizes_that_are_no_powers_of_two(dim_k, dim_v, slots, seed):
    check(gsa_inputs("clock", seed, tokens=40, batch=1, heads=1, dim_k=dim_k, dim_v=dim_v, slots=slots), seed)


@pytest.mark.parametrize("documents", [None, (0, 1, 20, 0)], ids=["visible", "packed"])
def test_more_slots_than_a_tile_holds(documents, monkeypatch, seed):
    monkeypatch.setattr(import_module("t2r_kernels.gsa.triton.ops"), "MOST_SLOTS", 16)
    inputs = gsa_inputs("zero every third", seed, tokens=19, documents=documents, heads=2, slots=37)
    visible = None if documents else some_visible("random", seed, 19, None, slots=37)
    want = run(gsa_call(gsa, documents, backend="naive", visible=visible), reference(inputs), seed)
    visible = None if documents else visible.to(DEVICE)
    compare(run(gsa_call(gsa, documents, backend="triton", visible=visible), on_device(inputs), seed), want, FLOAT32)


def test_every_element_is_written(monkeypatch, seed):
    """`torch.empty` full of NaN: what no kernel writes shows."""
    plain = torch.empty

    def poisoned(*args, **kwargs):
        x = plain(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", poisoned)
    check(gsa_inputs("mild", seed, documents=DOCUMENTS["empty and one-token"]), seed, DOCUMENTS["empty and one-token"])


def test_two_runs_are_bitwise_equal(seed):
    inputs = on_device(gsa_inputs("mild", seed, tokens=40, group=4))
    first, second = (run(gsa_call(gsa, None, backend="triton"), inputs, seed) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_final_state_continues_the_sequence(seed):
    x = on_device(gsa_inputs("mild", seed, tokens=70))
    q, k, v, log_alpha, state = x["q"], x["k"], x["v"], x["log_alpha"], (x["K"], x["V"])
    whole, final = gsa(q, k, v, log_alpha, initial_state=state, output_final_state=True, backend="triton")
    parts = []
    for part in (slice(0, 37), slice(37, 70)):
        o, state = gsa(
            *(y[:, part] for y in (q, k, v, log_alpha)), initial_state=state, output_final_state=True, backend="triton"
        )
        parts.append(o)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, final, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gate", ["zero every third"])
@pytest.mark.parametrize(("group", "dim_k", "dim_v", "slots"), [(2, 8, 12, 5), (3, 80, 96, 20), (1, 64, 32, 16)])
def test_steps_continue_a_prefill(gate, group, dim_k, dim_v, slots, seed):
    sizes = {"group": group, "dim_k": dim_k, "dim_v": dim_v, "slots": slots}
    x = on_device(gsa_inputs(gate, seed, tokens=25, **sizes))
    q, k, v, log_alpha, state = x["q"], x["k"], x["v"], x["log_alpha"], (x["K"], x["V"])
    whole, final = gsa(q, k, v, log_alpha, initial_state=state, output_final_state=True, backend="triton")
    first = (y[:, :20] for y in (q, k, v, log_alpha))
    _, state = gsa(*first, initial_state=state, output_final_state=True, backend="triton")
    for t in range(20, 25):
        o = gsa_step(q[:, t], k[:, t], v[:, t], log_alpha[:, t], state, backend="triton")
        torch.testing.assert_close(o, whole[:, t], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, final, rtol=1e-4, atol=1e-5)


def test_slots_that_cannot_be_seen(seed):
    generator = torch.Generator().manual_seed(seed)
    visible = torch.randint(1, 6, (2, 35), generator=generator).to(DEVICE)
    inputs = gsa_inputs("mild", seed, tokens=35)
    want = run(gsa_call(gsa, None, backend="naive", visible=visible.cpu()), reference(inputs), seed)
    compare(run(gsa_call(gsa, None, backend="triton", visible=visible), on_device(inputs), seed), want, FLOAT32)
    x = on_device(inputs)
    step = [x[name][:, 0] for name in ("q", "k", "v", "log_alpha")]
    o = gsa_step(*step, (x["K"].clone(), x["V"].clone()), visible=visible[:, 0], backend="triton")
    whole = gsa_step(*step, (x["K"], x["V"]), visible=visible[:, 0], backend="naive")
    torch.testing.assert_close(o, whole, rtol=1e-4, atol=1e-5)
