"""gsa and gsa_step in torch, against the recurrent definition in float64."""

import itertools

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from t2r_kernels import gsa, gsa_step
from t2r_kernels.gsa import chunk

from .cases import DOCUMENTS, GATES, LENGTHS, LONG, bounds, compare, gsa_call, gsa_inputs, reference, run, some_visible

# The worst row over many random draws errs by half of this: of dq, whose terms cancel where slots are nearly equal.
FLOAT32 = 4e-5


def check(inputs, seed, documents=None, tolerance=FLOAT32, **options):
    want = run(gsa_call(gsa, documents, backend="naive", **options), reference(inputs), seed)
    compare(run(gsa_call(gsa, documents, backend="torch", **options), inputs, seed), want, tolerance)


def ring(tokens, slots, dtype):
    """log_alpha [1, T, 1, M] of a clock without sinks: token t writes slot t mod M, the first token writes all."""
    gate = torch.zeros(1, tokens, 1, slots, dtype=dtype)
    gate[0, torch.arange(tokens), 0, torch.arange(tokens) % slots] = -torch.inf
    gate[0, 0] = -torch.inf
    return gate


@pytest.mark.parametrize("backend", ["naive", "torch"])
def test_a_ring_of_slots_is_sliding_window_attention(backend, seed):
    torch.manual_seed(seed)
    tokens, window = 50, 7
    q, k, v = (torch.randn(1, tokens, 1, 8, dtype=torch.float64) for _ in range(3))
    written = torch.arange(1, tokens + 1, dtype=torch.int32).clamp(max=window)[None]
    o, _ = gsa(q, k, v, ring(tokens, window, torch.float64), visible=written, backend=backend)
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    want = scaled_dot_product_attention(q, k, v, attn_mask=(distance >= 0) & (distance < window)).transpose(1, 2)
    torch.testing.assert_close(o, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_matches_the_definition(tokens, gate, seed):
    check(gsa_inputs(gate, seed, tokens=tokens), seed)


@pytest.mark.slow
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("tokens", LONG)
def test_matches_the_definition_on_long_sequences(tokens, gate, seed):
    check(gsa_inputs(gate, seed, tokens=tokens, batch=1), seed)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
def test_packed_documents_match_the_definition(documents, gate, seed):
    check(gsa_inputs(gate, seed, documents=documents), seed, documents)


@pytest.mark.parametrize("gate", ["mild", "clock"])
@pytest.mark.parametrize("kind", ["random", "written"])
@pytest.mark.parametrize("documents", [None, (1, 0, 20, 30)])
def test_hidden_slots_match_the_definition(documents, kind, gate, seed):
    inputs = gsa_inputs(gate, seed, tokens=37, documents=documents)
    check(inputs, seed, documents, visible=some_visible(kind, seed, 37, documents, slots=5))


@pytest.mark.parametrize("documents", [None, *DOCUMENTS.values()])
def test_many_spans_are_one(documents, seed, monkeypatch):
    monkeypatch.setattr(chunk, "SPAN_BYTES", 1)  # one step at a time
    inputs = gsa_inputs("mild", seed, tokens=75, documents=documents)
    check(inputs, seed, documents, visible=some_visible("random", seed, 75, documents, slots=5))


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("heads", [1, 3])
def test_any_grouping_of_heads_and_any_scale(heads, group, seed):
    check(gsa_inputs("mild", seed, tokens=37, heads=heads, group=group, dim_k=12, dim_v=8), seed, scale=1.0)


@pytest.mark.parametrize("documents", [None, (3, 0, 30)])
def test_float64_is_float64_throughout(documents, seed):
    inputs = gsa_inputs("clock", seed, tokens=33, documents=documents, dtype=torch.float64)
    check(inputs, seed, documents, tolerance=1e-13)


def test_bfloat16_inputs_are_accumulated_in_float32(seed):
    inputs = gsa_inputs("mild", seed, tokens=130, dtype=torch.bfloat16)
    want = run(gsa_call(gsa, None, backend="naive"), reference(inputs), seed)
    got = run(gsa_call(gsa, None, backend="torch"), inputs, seed)
    dtypes = {name: x.dtype for name, x in got.items() if x.dtype != torch.bfloat16}
    assert dtypes == dict.fromkeys(("final K", "final V", "d log_alpha", "d K", "d V"), torch.float32)
    compare({n: x for n, x in got.items() if n.startswith("final")}, {n: want[n] for n in ("final K", "final V")}, 2e-5)
    compare(got, want, 1e-2)  # upstream gradients and outputs are rounded to 8 bits, nothing else


@pytest.mark.parametrize("backend", ["naive", "torch"])
def test_autocast_changes_nothing(backend, seed):
    inputs = gsa_inputs("mild", seed, tokens=37, dtype=torch.bfloat16)
    call = gsa_call(gsa, None, backend=backend)

    def cast_call(**inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return call(**inputs)

    plain, cast = run(call, inputs, seed), run(cast_call, inputs, seed)
    assert all(torch.equal(cast[name], x) for name, x in plain.items())
    if backend == "torch":  # its backward is its own
        with torch.autocast("cpu", torch.bfloat16):
            cast = run(call, inputs, seed)
        assert all(torch.equal(cast[name], x) for name, x in plain.items())


@pytest.mark.parametrize("backend", ["naive", "torch"])
def test_gradients_agree_with_finite_differences(backend, seed):
    inputs = gsa_inputs("mild", seed, documents=(3, 0, 17), heads=1, dim_k=2, dim_v=3, slots=2, dtype=torch.float64)
    call = gsa_call(gsa, (3, 0, 17), backend=backend)
    leaves = [x.requires_grad_() for x in inputs.values()]
    torch.autograd.gradcheck(lambda *x: tuple(call(*x).values()), leaves, fast_mode=True)


def test_a_graph_can_be_walked_twice(seed):
    inputs = {name: x.requires_grad_() for name, x in gsa_inputs("mild", seed, tokens=37).items()}
    outputs = list(gsa_call(gsa, None, backend="torch")(**inputs).values())
    first, second = (
        torch.autograd.grad(outputs, list(inputs.values()), [x.detach() for x in outputs], retain_graph=True)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("gate", GATES)
def test_a_sequence_in_pieces_is_the_whole_with_every_gradient(gate, seed):
    inputs = gsa_inputs(gate, seed, tokens=90)
    cuts = [0, *sorted(torch.randperm(88, generator=torch.Generator().manual_seed(seed))[:3].add(1).tolist()), 90]
    print("cut at", cuts)

    def pieces(q, k, v, log_alpha, K, V):
        state, outputs = (K, V), []
        for start, stop in itertools.pairwise(cuts):
            part = (x[:, start:stop] for x in (q, k, v, log_alpha))
            o, state = gsa(*part, initial_state=state, output_final_state=True, backend="torch")
            outputs.append(o)
        return {"o": torch.cat(outputs, 1), "final K": state[0], "final V": state[1]}

    want = run(gsa_call(gsa, None, backend="naive"), reference(inputs), seed)
    compare(run(pieces, inputs, seed), want, FLOAT32)


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("gate", GATES)
def test_steps_after_a_prefill_are_the_whole_and_update_the_state_in_place(gate, hidden, seed):
    inputs = gsa_inputs(gate, seed, tokens=40)
    visible = {"visible": some_visible("random", seed, 40, None, slots=5)} if hidden else {}
    want, final = gsa(**_without_state(reference(inputs)), **visible, output_final_state=True, backend="naive")
    x = _without_state(inputs) | visible
    prefill = 1 + seed % 38
    o, state = gsa(**{n: y[:, :prefill] for n, y in x.items()}, output_final_state=True)
    outputs, addresses = [o], [s.data_ptr() for s in state]
    for t in range(prefill, 40):
        outputs.append(gsa_step(**{n: y[:, t] for n, y in x.items()}, state=state)[:, None])
    assert addresses == [s.data_ptr() for s in state]
    got = {"o": torch.cat(outputs, 1), "final K": state[0], "final V": state[1]}
    compare(got, {"o": want, "final K": final[0], "final V": final[1]}, FLOAT32)


def _without_state(inputs):
    return {name: x for name, x in inputs.items() if name not in "KV"}


@pytest.mark.parametrize("way", ["naive", "torch", "step"])
def test_a_gate_next_to_one_writes_exactly_its_little(way, seed):
    """1 - exp(-1e-6) has no correct digit but the first in float32."""
    inputs = _without_state(gsa_inputs("open", seed, tokens=1)) | {"log_alpha": torch.full((2, 1, 2, 5), -1e-6)}
    if way == "step":
        state = torch.zeros(2, 2, 5, 8), torch.zeros(2, 2, 5, 12)
        gsa_step(**{name: x[:, 0] for name, x in inputs.items()}, state=state)
    else:
        _, state = gsa(**inputs, output_final_state=True, backend=way)
    for got, name in zip(state, "kv", strict=True):
        want = 1e-6 * inputs[name].transpose(1, 2).expand_as(got)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


def test_documents_do_not_see_each_other(seed):
    documents = (20, 1, 30)
    inputs = _without_state(gsa_inputs("mild", seed, documents=documents))
    packed, _ = gsa(**inputs, cu_seqlens=bounds(documents))
    changed = {name: x.clone() for name, x in inputs.items()}
    for x in changed.values():
        x[:, :21] = -x[:, :21].abs() - 1
    other, _ = gsa(**changed, cu_seqlens=bounds(documents))
    assert not torch.equal(packed[:, :21], other[:, :21])
    assert torch.equal(packed[:, 21:], other[:, 21:])


def test_seventy_thousand_documents():
    lengths = tuple(int(n % 7 == 0) for n in range(70_000))
    inputs = _without_state(gsa_inputs("zero", 0, documents=lengths, heads=1, group=1, dim_k=2, dim_v=2, slots=1))
    o, (final_k, final_v) = gsa(**inputs, cu_seqlens=bounds(lengths), output_final_state=True)
    torch.testing.assert_close(o, inputs["v"])  # one token that writes the only slot
    written = torch.tensor(lengths, dtype=torch.bool)
    torch.testing.assert_close(final_k[written, :, 0], inputs["k"][0])
    assert not final_v[~written].any()


@pytest.mark.parametrize("documents", [None, (3, 0, 30, 1)])
def test_runs_are_bitwise_equal_and_read_no_uninitialised_memory(documents, seed):
    inputs = gsa_inputs("mild", seed, tokens=37, documents=documents)
    call = gsa_call(gsa, documents, backend="torch")
    first = run(call, inputs, seed)
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty(3).isnan().all()
        second = run(call, inputs, seed)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


def _valid():
    return _without_state(gsa_inputs("mild", 0, tokens=5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 5, 3, 8)}, "gsa: q has 3 heads, must be a multiple of the 2 heads of k"),
        ({"q": torch.zeros(2, 5, 4, 9)}, "gsa: q has shape (2, 5, 4, 9), must be [B, T, HQ, D] = [2, 5, *, 8]"),
        ({"k": torch.zeros(2, 5, 2)}, "gsa: k has shape (2, 5, 2), must be [B, T, H, D]"),
        ({"k": torch.zeros(2, 0, 2, 8)}, "gsa: k has shape (2, 0, 2, 8), every dimension must be at least 1"),
        ({"v": torch.zeros(2, 4, 2, 8)}, "gsa: v has shape (2, 4, 2, 8), must be [B, T, H, V] = [2, 5, 2, *]"),
        ({"v": torch.zeros(2, 5, 2, 8).int()}, "gsa: v has dtype torch.int32, must be floating point"),
        ({"v": torch.zeros(2, 5, 2, 8, device="meta")}, "gsa: v is on meta, must be on cpu like k"),
        ({"log_alpha": torch.zeros(2, 5, 4, 5)}, "gsa: log_alpha has shape (2, 5, 4, 5), must be [B, T, H, M]"),
        (
            {"initial_state": (torch.zeros(2, 2, 5, 8), torch.zeros(2, 2, 5, 8))},
            "gsa: state V has shape (2, 2, 5, 8), must be [N, H, M, V] = [2, 2, 5, 12]",
        ),
        ({"cu_seqlens": torch.tensor([0, 5]).int()}, "gsa: k has batch 2, must be 1 with cu_seqlens"),
        ({"visible": torch.ones(2, 4).int()}, "gsa: visible has shape (2, 4), must be [B, T] = [2, 5]"),
        ({"visible": torch.ones(2, 5)}, "gsa: visible is torch.float32 on cpu, must be int32 on cpu like k"),
        ({"backend": "cuda"}, "gsa: backend='cuda' is not one of auto, naive, torch, triton"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match="gsa") as error:
        gsa(**(_valid() | change))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("bounds", [[0, 3], [1, 5], [0, 4, 3, 5]])
def test_documents_must_cover_the_tokens(bounds):
    inputs = {name: x[:1] for name, x in _valid().items()}
    with pytest.raises(ValueError, match="gsa: cu_seqlens must rise from 0 to T = 5, got"):
        gsa(**inputs, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))


def test_bad_steps_are_named():
    inputs = {name: x[:, 0] for name, x in _valid().items()}
    with pytest.raises(ValueError, match=r"gsa_step: state K has shape \(3, 2, 5, 8\)"):
        gsa_step(*inputs.values(), (torch.zeros(3, 2, 5, 8), torch.zeros(3, 2, 5, 12)))
