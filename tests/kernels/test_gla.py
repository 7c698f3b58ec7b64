"""gla and gla_step in torch, against the recurrent definition in float64, and gsa as two calls of gla."""

import itertools

import pytest
import torch

from t2r_kernels import gla, gla_step, gsa
from t2r_kernels.gla import chunk

from .cases import DOCUMENTS, GATES, LENGTHS, LONG, bounds, compare, draw, gsa_inputs, reference, run

SIDES = ("key", "value", "scalar", None)
FLOAT32 = 2e-5


def gla_inputs(
    side, gate, seed, *, tokens=0, documents=None, batch=2, heads=2, group=2, dim_k=8, dim_v=12, write=True,
    dtype=torch.float32,
):  # fmt: skip
    """q, k, v, the log gate and write weights of the gated side, and an initial state in float32."""
    batch, tokens = (batch, tokens) if documents is None else (1, sum(documents))
    gated = {"key": (dim_k,), "value": (dim_v,)}.get(side, ())
    shapes = {
        "q": (batch, tokens, heads * group, dim_k),
        "k": (batch, tokens, heads, dim_k),
        "v": (batch, tokens, heads, dim_v),
        "state": (batch if documents is None else len(documents), heads, dim_k, dim_v),
    }
    if side is not None:
        shapes["log_decay"] = (batch, tokens, heads, *gated)
    if write:
        shapes["write"] = (batch, tokens, heads, *gated)
    inputs = draw(shapes, {"log_decay": gate}, seed, dtype)
    if write:  # the kernels round w k and not their product with q, which may cancel: the error is of the size of w
        inputs["write"].clamp_(-2, 2)
    return inputs | {"state": inputs["state"].to(torch.promote_types(dtype, torch.float32))}


def gla_call(side, documents, **options):
    def call(q, k, v, state, log_decay=None, write=None):
        cu_seqlens = None if documents is None else bounds(documents).to(q.device)
        o, final = gla(
            q, k, v, log_decay, gate=side, write=write, initial_state=state, output_final_state=True,
            cu_seqlens=cu_seqlens, **options,
        )  # fmt: skip
        return {"o": o, "final": final}

    return call


def check(side, inputs, seed, documents=None, tolerance=FLOAT32, **options):
    want = run(gla_call(side, documents, backend="naive", **options), reference(inputs), seed)
    compare(run(gla_call(side, documents, backend="torch", **options), inputs, seed), want, tolerance)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("side", SIDES[:3])
def test_matches_the_definition(side, tokens, gate, seed):
    check(side, gla_inputs(side, gate, seed, tokens=tokens), seed)


@pytest.mark.parametrize("tokens", LENGTHS)
def test_matches_the_definition_without_a_gate(tokens, seed):
    check(None, gla_inputs(None, "", seed, tokens=tokens), seed)


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["mild", "clock", "zero every third"])
@pytest.mark.parametrize("tokens", LONG)
@pytest.mark.parametrize("side", SIDES[:3])
def test_matches_the_definition_on_long_sequences(side, tokens, gate, seed):
    check(side, gla_inputs(side, gate, seed, tokens=tokens), seed)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("side", SIDES)
def test_packed_documents_match_the_definition(side, documents, gate, seed):
    check(side, gla_inputs(side, gate, seed, documents=documents), seed, documents)


@pytest.mark.parametrize("side", SIDES)
def test_many_pieces_are_one(side, seed, monkeypatch):
    monkeypatch.setattr(chunk, "PIECE_BYTES", 1)  # one block at a time
    check(side, gla_inputs(side, "mild", seed, tokens=150), seed)
    check(side, gla_inputs(side, "mild", seed, tokens=150, write=False), seed)


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("side", SIDES)
def test_any_grouping_of_heads_any_scale_and_no_write_weight(side, group, seed):
    inputs = gla_inputs(side, "mild", seed, tokens=37, heads=3, group=group, dim_k=12, dim_v=8, write=False)
    check(side, inputs, seed, scale=1.0)


@pytest.mark.parametrize("side", SIDES)
def test_float64_is_float64_throughout(side, seed):
    check(side, gla_inputs(side, "clock", seed, tokens=70, dtype=torch.float64), seed, tolerance=1e-13)


@pytest.mark.parametrize("side", SIDES)
def test_bfloat16_inputs_are_accumulated_in_float32(side, seed):
    inputs = gla_inputs(side, "mild", seed, tokens=130, dtype=torch.bfloat16)
    want = run(gla_call(side, None, backend="naive"), reference(inputs), seed)
    got = run(gla_call(side, None, backend="torch"), inputs, seed)
    assert got["o"].dtype == got["d q"].dtype == torch.bfloat16
    assert got["final"].dtype == got["d state"].dtype == torch.float32
    compare({"final": got["final"]}, {"final": want["final"]}, 2e-5)
    compare(got, want, 1e-2)


@pytest.mark.parametrize("side", SIDES)
def test_autocast_changes_nothing(side, seed):
    inputs = gla_inputs(side, "mild", seed, tokens=37, dtype=torch.bfloat16)
    call = gla_call(side, None, backend="torch")

    def cast_call(**inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return call(**inputs)

    plain, cast = run(call, inputs, seed), run(cast_call, inputs, seed)
    assert all(torch.equal(cast[name], x) for name, x in plain.items())


@pytest.mark.parametrize("backend", ["naive", "torch"])
@pytest.mark.parametrize("side", SIDES)
def test_gradients_agree_with_finite_differences(side, backend, seed):
    documents = (3, 0, 17)
    inputs = gla_inputs(side, "mild", seed, documents=documents, heads=1, dim_k=2, dim_v=3, dtype=torch.float64)
    call = gla_call(side, documents, backend=backend)
    leaves = [x.requires_grad_() for x in inputs.values()]
    torch.autograd.gradcheck(
        lambda *x: tuple(call(**dict(zip(inputs, x, strict=True))).values()), leaves, fast_mode=True
    )


@pytest.mark.parametrize("gate", ["mild", "zero every third"])
@pytest.mark.parametrize("side", SIDES)
def test_a_sequence_in_pieces_is_the_whole_with_every_gradient(side, gate, seed):
    inputs = gla_inputs(side, gate, seed, tokens=90)
    cuts = [0, *sorted(torch.randperm(88, generator=torch.Generator().manual_seed(seed))[:3].add(1).tolist()), 90]
    print("cut at", cuts)

    def pieces(state, **inputs):
        outputs = []
        for start, stop in itertools.pairwise(cuts):
            part = {name: x[:, start:stop] for name, x in inputs.items()}
            o, state = gla(**part, gate=side, initial_state=state, output_final_state=True)
            outputs.append(o)
        return {"o": torch.cat(outputs, 1), "final": state}

    want = run(gla_call(side, None, backend="naive"), reference(inputs), seed)
    compare(run(pieces, inputs, seed), want, FLOAT32)


@pytest.mark.parametrize("write", [True, False])
@pytest.mark.parametrize("gate", ["mild", "clock", "zero every third"])
@pytest.mark.parametrize("side", SIDES)
def test_steps_after_a_prefill_are_the_whole_and_update_the_state_in_place(side, gate, write, seed):
    inputs = gla_inputs(side, gate, seed, tokens=40, write=write)
    initial = inputs.pop("state")
    wide = reference(inputs)
    want, final = gla(**wide, gate=side, initial_state=initial.double(), output_final_state=True, backend="naive")
    prefill = 1 + seed % 38
    first = {name: x[:, :prefill] for name, x in inputs.items()}
    o, state = gla(**first, gate=side, initial_state=initial, output_final_state=True)
    outputs, address = [o], state.data_ptr()
    for t in range(prefill, 40):
        token = {"log_decay": None} | {name: x[:, t] for name, x in inputs.items()}
        outputs.append(gla_step(**token, state=state, gate=side)[:, None])
    assert address == state.data_ptr()
    compare({"o": torch.cat(outputs, 1), "final": state}, {"o": want, "final": final}, FLOAT32)


@pytest.mark.parametrize("backend", ["naive", "torch"])
@pytest.mark.parametrize("documents", [None, (3, 0, 30, 1)])
def test_gated_slot_attention_is_two_calls(documents, backend, seed):
    inputs = gsa_inputs("mild", seed, tokens=45, documents=documents)
    options = {"cu_seqlens": bounds(documents), "output_final_state": True, "backend": backend}

    def whole(q, k, v, log_alpha, K, V):
        o, (final_k, final_v) = gsa(q, k, v, log_alpha, initial_state=(K, V), **options)
        return {"o": o, "final K": final_k, "final V": final_v}

    def two_calls(q, k, v, log_alpha, K, V):
        ones, write = torch.ones_like(log_alpha), -torch.expm1(log_alpha)
        scores, final_k = gla(q, k, ones, log_alpha, gate="value", write=write, initial_state=K.mT, **options)
        p = scores.softmax(-1)
        o, final_v = gla(p, ones, v, log_alpha, gate="key", write=write, scale=1.0, initial_state=V, **options)
        return {"o": o, "final K": final_k.mT, "final V": final_v}

    want = run(whole, reference(inputs), seed)
    compare(run(two_calls, inputs, seed), want, FLOAT32)


def test_plain_linear_attention_is_causal_attention_without_softmax(seed):
    inputs = gla_inputs(None, "", seed, tokens=70, group=1, write=False, dtype=torch.float64)
    q, k, v = (inputs[name].transpose(1, 2) for name in "qkv")
    want = ((q @ k.mT).tril() @ v).transpose(1, 2)
    o, _ = gla(inputs["q"], inputs["k"], inputs["v"], scale=1.0)
    torch.testing.assert_close(o, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": "head"}, "gla: gate='head' is not one of 'key', 'value', 'scalar', None"),
        ({"gate": None}, "gla: log_decay is not None with gate=None"),
        ({"log_decay": None}, "gla: log_decay is None with gate='key'"),
        ({"gate": "value"}, "gla: log_decay has shape (2, 5, 2, 8), must be [B, T, H, V] = [2, 5, 2, 12]"),
        ({"write": torch.ones(2, 5, 2)}, "gla: write has shape (2, 5, 2), must be [B, T, H, D] = [2, 5, 2, 8]"),
        ({"initial_state": torch.ones(1, 2, 8, 12)}, "gla: state has shape (1, 2, 8, 12), must be [N, H, D, V]"),
        (
            {name: torch.ones(1, 5, 2, 8) for name in ("q", "k", "v", "log_decay")}
            | {"cu_seqlens": torch.tensor([0, 5], device="meta")},
            "gla: cu_seqlens is on meta, must be on cpu like k",
        ),
        ({"q": torch.ones(2, 5, 3, 8)}, "gla: q has 3 heads, must be a multiple of the 2 heads of k"),
    ],
)
def test_bad_input_is_named(change, message):
    inputs = gla_inputs("key", "mild", 0, tokens=5, write=False)
    del inputs["state"]
    with pytest.raises(ValueError, match="gla") as error:
        gla(**(inputs | {"gate": "key"} | change))
    assert str(error.value).startswith(message)
