"""gsa in Triton on a GPU: every size and type that dispatch can choose, and what only a GPU can show."""

import pytest
import torch

from t2r_kernels import gsa, gsa_step

from .cases import DOCUMENTS, GATES, bounds, compare, gsa_call, gsa_inputs, reference, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOLERANCE = {torch.bfloat16: 1.5e-2, torch.float16: 4e-3, torch.float32: 5e-5}
WIDTHS = (64, 80, 96, 128, 256)
SLOTS = (16, 32, 64, 128, 256)


def cuda(inputs):
    return {name: x.cuda() for name, x in inputs.items()}


def check(inputs, seed, documents=None):
    """Against float64 on the CPU: token after token it is faster there."""
    want = run(gsa_call(gsa, documents, backend="naive"), reference(inputs), seed)
    compare(run(gsa_call(gsa, documents, backend="triton"), cuda(inputs), seed), want, TOLERANCE[inputs["q"].dtype])


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_size_in_bf16(width, slots, seed):
    sizes = {"dim_k": width, "dim_v": width, "slots": slots, "group": 4, "heads": 2, "batch": 1}
    check(gsa_inputs("mild", seed, tokens=127, dtype=torch.bfloat16, **sizes), seed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("width", "slots"), [(32, 64), (64, 64), (80, 32), (96, 16), (128, 64), (128, 128), (256, 64), (256, 256)]
)
def test_other_types(width, slots, dtype, seed):
    sizes = {"dim_k": width, "dim_v": width, "slots": slots, "group": 4, "heads": 2, "batch": 1}
    check(gsa_inputs("clock", seed, tokens=100, dtype=dtype, **sizes), seed)


@pytest.mark.parametrize("gate", ["mild", "clock"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("width", "slots", "group"), [(64, 496, 4), (64, 257, 1), (128, 512, 4), (80, 1000, 2)])
def test_more_slots_than_a_tile_holds(width, slots, group, dtype, gate, seed):
    sizes = {"dim_k": width, "dim_v": width, "slots": slots, "group": group, "heads": 1, "batch": 2}
    check(gsa_inputs(gate, seed, tokens=333, dtype=dtype, **sizes), seed)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 6, 7, 8, 16, 20])
def test_every_group_in_bf16(group, seed):
    sizes = {"dim_k": 64, "dim_v": 128, "slots": 64, "group": group, "heads": 2, "batch": 2}
    check(gsa_inputs("mild", seed, tokens=100, dtype=torch.bfloat16, **sizes), seed)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("tokens", [1, 2, 15, 63, 64, 65, 1000, 4097])
def test_lengths_and_gates_in_bf16(tokens, gate, seed):
    sizes = {"dim_k": 64, "dim_v": 64, "slots": 32, "group": 4, "heads": 2, "batch": 1}
    check(gsa_inputs(gate, seed, tokens=tokens, dtype=torch.bfloat16, **sizes), seed)


@pytest.mark.parametrize("gate", ["mild", "clock", "zero every third"])
@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_documents(documents, gate, dtype, seed):
    sizes = {"dim_k": 64, "dim_v": 64, "slots": 32, "group": 4, "heads": 2}
    check(gsa_inputs(gate, seed, documents=documents, dtype=dtype, **sizes), seed, documents)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_many_documents(dtype, seed):
    """70,000 documents, more than a grid's second axis holds: one token each but the last, which stands for its own."""
    lengths = (1,) * 69_999 + (40,)
    x = cuda(gsa_inputs("mild", seed, tokens=sum(lengths), batch=1, heads=1, dim_k=16, dim_v=16, slots=16, dtype=dtype))
    q, k, v, log_alpha = (x[name] for name in ("q", "k", "v", "log_alpha"))
    o, (final_k, _) = gsa(q, k, v, log_alpha, output_final_state=True, cu_seqlens=bounds(lengths).cuda())
    want = -torch.expm1(log_alpha)[0, :69_999, :, :, None] * k[0, :69_999, :, None].float()
    torch.testing.assert_close(final_k[:-1], want, rtol=1e-2, atol=1e-3)
    last = [y[:, -40:].double() for y in (q, k, v, log_alpha)]
    torch.testing.assert_close(o[:, -40:].double(), gsa(*last, backend="naive")[0], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_offsets_beyond_two_to_the_31(dtype, seed):
    """q alone has more than 2^31 elements; the last sequence of the batch must equal that sequence alone."""
    B, T, HQ, H, D, M = 33, 2048, 32, 8, 1024 // 8, 16
    B = 2**31 // (T * HQ * D) + 2
    torch.manual_seed(seed)
    q = torch.randn(B, T, HQ, D, device="cuda", dtype=dtype)
    k, v = (torch.randn(B, T, H, D, device="cuda", dtype=dtype) for _ in range(2))
    log_alpha = torch.nn.functional.logsigmoid(torch.randn(B, T, H, M, device="cuda") + 3)
    leaves = [x.requires_grad_() for x in (q, k, v, log_alpha)]
    assert q.numel() > 2**31
    o, _ = gsa(*leaves)
    alone = [x.detach()[-1:].clone().requires_grad_() for x in leaves]
    want, _ = gsa(*alone)
    assert (o[-1:].double() - want.double()).norm() <= 1e-2 * want.double().norm()
    if dtype == torch.bfloat16:
        upstream = torch.randn_like(o)
        got = torch.autograd.grad(o, leaves, upstream)
        for mine, other in zip(got, torch.autograd.grad(want, alone, upstream[-1:]), strict=True):
            assert (mine[-1:].double() - other.double()).norm() <= 1e-2 * other.double().norm()


def test_small_for_a_sanitizer(seed):
    """Every kernel of both paths and of the step, few tokens: what compute-sanitizer can go through in a minute."""
    for dtype in (torch.bfloat16, torch.float32):
        x = cuda(gsa_inputs("mild", seed, documents=(0, 1, 20), heads=1, dim_k=32, dim_v=16, slots=16, dtype=dtype))
        got = run(gsa_call(gsa, (0, 1, 20), backend="triton"), x, seed)
        assert all(y.isfinite().all() for y in got.values())
        step = [x[name][:, 0] for name in ("q", "k", "v", "log_alpha")]
        state = x["K"][:1].contiguous(), x["V"][:1].contiguous()
        assert gsa_step(*step, state).isfinite().all()


def test_two_runs_are_bitwise_equal_in_bf16(seed):
    sizes = {"dim_k": 128, "dim_v": 128, "slots": 64, "group": 4, "heads": 8, "batch": 2}
    inputs = cuda(gsa_inputs("mild", seed, tokens=700, dtype=torch.bfloat16, **sizes))
    first, second = (run(gsa_call(gsa, None, backend="triton"), inputs, seed) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("documents", [None, (0, 1, 90, 36)])
def test_every_element_is_written_in_bf16(documents, monkeypatch, seed):
    plain = torch.empty

    def poisoned(*args, **kwargs):
        x = plain(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", poisoned)
    sizes = {"dim_k": 80, "dim_v": 96, "slots": 33, "group": 3}
    check(gsa_inputs("mild", seed, tokens=127, documents=documents, dtype=torch.bfloat16, **sizes), seed, documents)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_repeated_pass_reads_nothing_unwritten(dtype, monkeypatch, seed):
    inputs = cuda(gsa_inputs("mild", seed, tokens=333, dim_k=64, dim_v=64, slots=32, dtype=dtype))
    want = run(gsa_call(gsa, None, backend="triton"), inputs, seed)
    plain = torch.empty

    def poisoned(*args, **kwargs):
        x = plain(*args, **kwargs)
        x.view(torch.uint8).fill_(255)  # NaN in every type
        return x

    monkeypatch.setattr(torch, "empty", poisoned)
    got = run(gsa_call(gsa, None, backend="triton"), inputs, seed)
    assert all(torch.equal(got[name], x) for name, x in want.items())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_kernels_run_where_their_tensors_are(seed):
    inputs = cuda(gsa_inputs("mild", seed, tokens=40, dtype=torch.bfloat16))
    want = run(gsa_call(gsa, None, backend="triton"), inputs, seed)
    there = {name: x.to("cuda:1") for name, x in inputs.items()}
    got = run(gsa_call(gsa, None, backend="triton"), there, seed)
    assert all(torch.equal(got[name], x.to("cuda:1")) for name, x in want.items())


@pytest.mark.parametrize(
    ("group", "width", "slots"),
    [(4, 128, 64), (1, 80, 33), (2, 64, 128), (3, 128, 7), (8, 256, 256), (7, 96, 16), (4, 256, 64), (20, 128, 48)],
)
def test_steps_in_a_cuda_graph_continue_a_prefill(group, width, slots, seed):
    sizes = {"group": group, "dim_k": width, "dim_v": width, "slots": slots}
    x = cuda(gsa_inputs("mild", seed, tokens=25, dtype=torch.bfloat16, **sizes))
    inputs = [x[name] for name in ("q", "k", "v", "log_alpha")]
    _, state = gsa(*(y[:, :20] for y in inputs), output_final_state=True)
    want, wanted = gsa(*(y.double() for y in inputs), output_final_state=True, backend="naive")
    now = [y[:, 20].clone() for y in inputs]
    copy = tuple(s.clone() for s in state)
    gsa_step(*now, copy)  # compiled outside the graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = gsa_step(*now, state)
    for t in range(20, 25):
        for buffer, y in zip(now, inputs, strict=True):
            buffer.copy_(y[:, t])
        graph.replay()
        torch.testing.assert_close(o.double(), want[:, t], rtol=3e-2, atol=3e-2)
    for mine, other in zip(state, wanted, strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=1e-2, atol=1e-2)
