"""gla in Triton on a GPU: every size and type that dispatch can choose, and what only a GPU can show."""

import pytest
import torch

from t2r_kernels import gla, gla_step

from .cases import DOCUMENTS, GATES, bounds, compare, reference, run
from .test_gla import SIDES, gla_call, gla_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOLERANCE = {torch.bfloat16: 1.5e-2, torch.float16: 4e-3, torch.float32: 5e-5}
WIDTHS = (16, 32, 64, 80, 96, 128, 256)


def cuda(inputs):
    return {name: x.cuda() for name, x in inputs.items()}


def sizes_of(side, inputs, seed, documents):
    """A gradient of a gate or weight per head is a sum over D, and keeps the rounding of its terms where they cancel:
    their norm, [B, T], from the same problem with a gate on keys whose rows are alike."""
    if side != "scalar":
        return None
    rows = reference(inputs)
    rows |= {name: rows[name][..., None].expand_as(rows["k"]) for name in ("log_decay", "write") if name in rows}
    got = run(gla_call("key", documents, backend="torch"), rows, seed)
    return {f"d {name}": got[f"d {name}"].cpu().norm(dim=(-2, -1)) for name in ("log_decay", "write") if name in rows}


def check(side, inputs, seed, documents=None):
    inputs = cuda(inputs)
    want = run(gla_call(side, documents, backend="naive"), reference(inputs), seed)
    want = {name: x.cpu() for name, x in want.items()}
    got = run(gla_call(side, documents, backend="triton"), inputs, seed)
    compare(got, want, TOLERANCE[inputs["q"].dtype], sizes=sizes_of(side, inputs, seed, documents))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("side", SIDES)
def test_every_size_in_bf16(side, width, seed):
    sizes = {"dim_k": width, "dim_v": width, "group": 4, "batch": 1}
    check(side, gla_inputs(side, "mild", seed, tokens=127, dtype=torch.bfloat16, **sizes), seed)


@pytest.mark.parametrize(("dim_k", "dim_v"), [(256, 64), (64, 256), (128, 1)])
@pytest.mark.parametrize("side", SIDES)
def test_sides_of_different_width_without_write_weights(side, dim_k, dim_v, seed):
    sizes = {"dim_k": dim_k, "dim_v": dim_v, "group": 4, "batch": 1, "write": False}
    check(side, gla_inputs(side, "mild", seed, tokens=127, dtype=torch.bfloat16, **sizes), seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [32, 80, 128, 256])
@pytest.mark.parametrize("side", SIDES)
def test_other_types(side, width, dtype, seed):
    sizes = {"dim_k": width, "dim_v": width, "group": 4, "batch": 1}
    check(side, gla_inputs(side, "clock", seed, tokens=100, dtype=dtype, **sizes), seed)


@pytest.mark.parametrize("group", [1, 2, 3, 6, 7, 8, 16, 20])
@pytest.mark.parametrize("side", ["key", "value", "scalar"])
def test_every_group_in_bf16(side, group, seed):
    sizes = {"dim_k": 64, "dim_v": 128, "group": group}
    check(side, gla_inputs(side, "mild", seed, tokens=100, dtype=torch.bfloat16, **sizes), seed)


@pytest.mark.parametrize("group", [1, 2, 8])
@pytest.mark.parametrize("width", [32, 128, 256])
@pytest.mark.parametrize("side", ["key", "value", "scalar"])
def test_groups_and_sizes_in_bf16(side, width, group, seed):
    sizes = {"dim_k": width, "dim_v": width, "group": group}
    check(side, gla_inputs(side, "mild", seed, tokens=100, dtype=torch.bfloat16, **sizes), seed)


@pytest.mark.parametrize("group", [1, 2, 20])
@pytest.mark.parametrize("side", ["key", "value", "scalar"])
def test_groups_in_float32(side, group, seed):
    check(side, gla_inputs(side, "mild", seed, tokens=100, dim_k=256, dim_v=64, group=group), seed)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("tokens", [1, 2, 15, 63, 64, 65, 1000, 4097])
@pytest.mark.parametrize("side", ["key", "value", "scalar"])
def test_lengths_and_gates_in_bf16(side, tokens, gate, seed):
    # Of one token there are few numbers, and tolerance is set by their average: more sequences.
    sizes = {"dim_k": 64, "dim_v": 64, "group": 4, "batch": 16 if tokens < 3 else 1}
    check(side, gla_inputs(side, gate, seed, tokens=tokens, dtype=torch.bfloat16, **sizes), seed)


@pytest.mark.parametrize("gate", ["mild", "clock", "zero every third"])
@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("side", SIDES)
def test_documents(side, documents, gate, seed):
    sizes = {"dim_k": 64, "dim_v": 64, "group": 4}
    check(side, gla_inputs(side, gate, seed, documents=documents, dtype=torch.bfloat16, **sizes), seed, documents)


@pytest.mark.parametrize("side", ["key", "value", "scalar"])
def test_many_documents(side, seed):
    """70,000 documents, more than a grid's second axis holds: one token each but the last, which stands for its own."""
    lengths = (1,) * 69_999 + (40,)
    sizes = {"batch": 1, "heads": 1, "dim_k": 16, "dim_v": 16, "write": False}
    x = cuda(gla_inputs(side, "mild", seed, tokens=sum(lengths), dtype=torch.bfloat16, **sizes))
    del x["state"]
    leaves = [y.requires_grad_() for y in x.values()]
    o, final = gla(**x, gate=side, output_final_state=True, cu_seqlens=bounds(lengths).cuda())
    want = x["k"][0, :69_999, :, :, None].float() * x["v"][0, :69_999, :, None].float()
    torch.testing.assert_close(final[:-1], want, rtol=1e-2, atol=1e-2)
    last = {name: y.detach()[:, -40:].double().requires_grad_() for name, y in x.items()}
    alone, _ = gla(**last, gate=side, backend="naive")
    upstream = torch.randn_like(o)
    got = dict(zip(x, torch.autograd.grad(o, leaves, upstream), strict=True))
    exact = dict(zip(x, torch.autograd.grad(alone, list(last.values()), upstream[:, -40:].double()), strict=True))
    compare({name: y[:, -40:] for name, y in got.items()}, {name: y.cpu() for name, y in exact.items()}, 1.5e-2)
    assert all(torch.isfinite(y).all() for y in got.values())


@pytest.mark.parametrize("side", ["key", "value"])
def test_offsets_beyond_two_to_the_31(side, seed):
    """q alone has more than 2^31 elements; the last sequence of the batch must equal that sequence alone."""
    T, HQ, H, D, V = 2048, 32, 4, 128, 32
    B = 2**31 // (T * HQ * D) + 2
    torch.manual_seed(seed)
    q, k, v = (
        torch.randn(B, T, heads, width, device="cuda", dtype=torch.bfloat16)
        for heads, width in ((HQ, D), (H, D), (H, V))
    )
    gate = torch.nn.functional.logsigmoid(torch.randn(k.shape if side == "key" else v.shape, device="cuda") + 3)
    leaves = [x.requires_grad_() for x in (q, k, v, gate)]
    assert q.numel() > 2**31
    o, _ = gla(*leaves, gate=side)
    alone = [x.detach()[-1:].clone().requires_grad_() for x in leaves]
    want, _ = gla(*alone, gate=side)
    assert torch.equal(o[-1:], want)
    upstream = torch.randn_like(o)
    got = torch.autograd.grad(o, leaves, upstream)
    for mine, other in zip(got, torch.autograd.grad(want, alone, upstream[-1:]), strict=True):
        assert torch.equal(mine[-1:], other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("side", SIDES)
def test_small_for_a_sanitizer(side, dtype, seed):
    """Every kernel and the step, few tokens: what compute-sanitizer can go through in a minute."""
    sizes = {"documents": (0, 1, 20), "heads": 1, "dim_k": 32, "dim_v": 16, "dtype": dtype}
    inputs = gla_inputs(side, "mild", seed, **sizes)
    check(side, inputs, seed, (0, 1, 20))
    x = cuda(inputs)
    step = {"log_decay": None} | {name: x[name][:, 0] for name in x if name != "state"}
    assert gla_step(**step, state=x["state"][:1].contiguous(), gate=side).isfinite().all()


@pytest.mark.parametrize("side", SIDES)
def test_two_runs_are_bitwise_equal_in_bf16(side, seed):
    sizes = {"dim_k": 128, "dim_v": 128, "group": 4, "heads": 8}
    inputs = cuda(gla_inputs(side, "mild", seed, tokens=700, dtype=torch.bfloat16, **sizes))
    first, second = (run(gla_call(side, None, backend="triton"), inputs, seed) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("documents", [None, (0, 1, 90, 36)])
@pytest.mark.parametrize("side", SIDES)
def test_every_element_is_written_in_bf16(side, documents, monkeypatch, seed):
    plain = torch.empty

    def poisoned(*args, **kwargs):
        x = plain(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", poisoned)
    sizes = {"dim_k": 80, "dim_v": 96, "group": 3}
    x = gla_inputs(side, "mild", seed, tokens=127, documents=documents, dtype=torch.bfloat16, **sizes)
    check(side, x, seed, documents)


@pytest.mark.parametrize(("group", "dim_k", "dim_v"), [(4, 128, 128), (1, 80, 33), (7, 96, 1), (8, 256, 256)])
@pytest.mark.parametrize("side", SIDES)
def test_steps_in_a_cuda_graph_continue_a_prefill(side, group, dim_k, dim_v, seed):
    sizes = {"group": group, "dim_k": dim_k, "dim_v": dim_v}
    x = cuda(gla_inputs(side, "mild", seed, tokens=25, dtype=torch.bfloat16, **sizes))
    del x["state"]
    _, state = gla(**{name: y[:, :20] for name, y in x.items()}, gate=side, output_final_state=True)
    want, wanted = gla(**reference(x), gate=side, output_final_state=True, backend="naive")
    now = {"log_decay": None} | {name: y[:, 20].clone() for name, y in x.items()}
    gla_step(**now, state=state.clone(), gate=side)  # compiled outside the graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = gla_step(**now, state=state, gate=side)
    outputs = []
    for t in range(20, 25):
        for name, y in x.items():
            now[name].copy_(y[:, t])
        graph.replay()
        outputs.append(o.clone())
    got = {"o": torch.stack(outputs, 1), "final": state}
    compare(got, {"o": want[:, 20:].cpu(), "final": wanted.cpu()}, TOLERANCE[torch.bfloat16])
