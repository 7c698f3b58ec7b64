"""The fast path of gsa in Triton, which dispatch takes in bf16, run here in fp32 so that the interpreter can check it.

Its factors keep what a gate forgets at 2^-13 of its weight until a tile ends; the tolerance allows for that. It is
widest for the gradient of an initial state that the first token forgets: 2^-13 of what 48 rows (token, head) read is
about 5e-4, where `compare` allows a tenth of the tolerance.
"""

import os
from importlib import import_module

import pytest
import torch

from t2r_kernels import gsa

from .cases import DOCUMENTS, compare, gsa_call, gsa_inputs, reference, run, some_visible

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="runs through test_triton_interpreter.py"
)
FORGOTTEN = 1e-2


@pytest.fixture
def walked(monkeypatch):
    """gsa on the fast path in fp32, in segments of 32 tokens."""
    import triton.language as tl

    from t2r_kernels.gsa.triton import ops, walk, walk_forward

    monkeypatch.setattr(ops, "most_slots", lambda *sizes: 16)
    forward, backward = ops.walk_forward, ops.walk_backward
    monkeypatch.setattr(ops, "walk_forward", lambda *args: forward(*args, operand=tl.float32))
    monkeypatch.setattr(ops, "walk_backward", lambda *args: backward(*args, operand=tl.float32))
    for module in (walk, walk_forward):
        monkeypatch.setattr(module, "segment_length", lambda *args: 32)


def check(inputs, seed, documents=None, tolerance=3e-5, visible=None):
    want = run(gsa_call(gsa, documents, backend="naive", visible=visible), reference(inputs), seed)
    compare(run(gsa_call(gsa, documents, backend="triton", visible=visible), inputs, seed), want, tolerance)


@pytest.mark.parametrize("tokens", [1, 16, 17, 70])
def test_matches_the_definition(walked, tokens, seed):
    check(gsa_inputs("mild", seed, tokens=tokens, batch=1, heads=1, group=4), seed)


@pytest.mark.parametrize("gate", ["clock", "closed every fourth", "zero every third", "zero", "open"])
def test_gates_that_forget(walked, gate, seed):
    check(gsa_inputs(gate, seed, tokens=35, batch=1, heads=1, group=3), seed, tolerance=FORGOTTEN)


@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
def test_packed_documents(walked, documents, seed):
    check(gsa_inputs("mild", seed, documents=documents, heads=1), seed, documents)


def test_every_element_is_written(walked, monkeypatch, seed):
    plain = torch.empty

    def poisoned(*args, **kwargs):
        x = plain(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", poisoned)
    documents = (0, 1, 20, 0)
    check(gsa_inputs("mild", seed, documents=documents), seed, documents)


def test_slots_that_cannot_be_seen(walked, seed):
    generator = torch.Generator().manual_seed(seed)
    visible = torch.randint(1, 6, (2, 35), generator=generator)
    inputs = gsa_inputs("mild", seed, tokens=35)
    want = run(gsa_call(gsa, None, backend="naive", visible=visible), reference(inputs), seed)
    compare(run(gsa_call(gsa, None, backend="triton", visible=visible), inputs, seed), want, 3e-5)


@pytest.mark.parametrize(
    ("slots", "most", "limit"), [(21, 16, None), (32, 16, "written"), (50, 16, "random"), (37, 32, "written")]
)
def test_pieces(walked, slots, most, limit, monkeypatch, seed):
    monkeypatch.setattr(import_module("t2r_kernels.gsa.triton.ops"), "most_slots", lambda *sizes: most)
    visible = None if limit is None else some_visible(limit, seed, 35, None, slots)[:1]
    check(gsa_inputs("mild", seed, tokens=35, batch=1, slots=slots, group=1 + slots % 3), seed, visible=visible)


@pytest.mark.parametrize("gate", ["clock", "zero every third"])
def test_gates_that_forget_in_pieces(walked, gate, seed):
    check(gsa_inputs(gate, seed, tokens=35, batch=1, heads=1, group=3, slots=37), seed, tolerance=FORGOTTEN)


def test_pieces_of_packed_documents(walked, seed):
    documents = (0, 1, 20, 0)
    visible = some_visible("written", seed, 21, documents, 40)
    check(gsa_inputs("mild", seed, documents=documents, slots=40), seed, documents, visible=visible)
