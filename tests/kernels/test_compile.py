"""gsa and gsa_gates as torch operators: one node of a compiled graph, with values and gradients as in eager mode."""

import functools

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from t2r_kernels import gsa, gsa_gates
from t2r_kernels.gsa import operators
from t2r_kernels.gsa.operators import gsa_backward, gsa_forward

from .cases import bounds, gsa_inputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKEND = "triton" if torch.cuda.is_available() else "torch"
SIZES = {"tokens": 20, "dim_k": 32, "dim_v": 32, "slots": 16}


def leaves(seed, **options):
    x = gsa_inputs("mild", seed, **{**SIZES, **options})
    return [x[name].to(DEVICE).requires_grad_() for name in ("q", "k", "v", "log_alpha", "K", "V")]


@pytest.mark.parametrize("documents", [None, (9, 0, 11)])
def test_gsa_compiles_into_one_graph(documents, seed):
    args = leaves(seed, documents=documents)
    cu_seqlens = None if documents is None else bounds(documents).to(DEVICE)

    def loss(q, k, v, log_alpha, *state):
        o, final = gsa(q, k, v, log_alpha, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens)
        return sum(x.float().square().sum() for x in (o, *final))

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(f(*args), args) for f in (compiled, loss))
    torch.testing.assert_close(got, want)


def test_gates_compile_into_one_graph(seed):
    torch.manual_seed(seed)
    args = [torch.randn(shape, device=DEVICE).requires_grad_() for shape in ((2, 20, 2, 16), (2, 16), (2, 16))]
    position = torch.arange(20, device=DEVICE).expand(2, -1)

    def loss(gate, bias, amplitude):
        log_alpha = gsa_gates(gate, bias=bias, amplitude=amplitude, position=position, sinks=2, ring=10)
        return log_alpha.exp().square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(f(*args), args) for f in (compiled, loss))
    torch.testing.assert_close(got, want)


def test_selective_checkpointing_keeps_the_output(monkeypatch, seed):
    """With a policy that saves gsa's operator the forward kernels run once, not again for the backward pass."""
    ran = []
    forward = operators.forward
    monkeypatch.setattr(operators, "forward", lambda *args: ran.append(1) or forward(*args))
    args = leaves(seed)[:4]

    def loss(q, k, v, log_alpha):
        return gsa(2 * q, 2 * k, 2 * v, log_alpha)[0].square().sum()

    def policy(context, op, *args, **kwargs):
        save = op is torch.ops.t2r_kernels.gsa_forward.default
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    kept = checkpoint(loss, *args, use_reentrant=False, context_fn=contexts)
    got = torch.autograd.grad(kept, args)
    assert len(ran) == 1
    torch.testing.assert_close(got, torch.autograd.grad(loss(*args), args))


@pytest.mark.parametrize("with_state", [False, True])
def test_operators_keep_their_contract(with_state, seed):
    """torch's own check: schema, fake kernels, autograd registration."""
    q, k, v, log_alpha, *state = leaves(seed)
    state = state if with_state else [None, None]
    torch.library.opcheck(gsa_forward, (q, k, v, log_alpha, *state, None, None, 0.2, with_state, BACKEND))
    inputs = [None if x is None else x.detach() for x in (q, k, v, log_alpha, *state)]
    upstream = [torch.ones_like(x) if with_state else None for x in state]
    torch.library.opcheck(gsa_backward, (torch.ones_like(q), *upstream, *inputs, None, None, 0.2, BACKEND))


@pytest.mark.skipif(DEVICE == "cpu", reason="on a CPU gsa_gates is plain torch")
def test_the_operators_of_gates_keep_their_contract(seed):
    from t2r_kernels.gsa.triton.gates_operators import gates_forward

    torch.manual_seed(seed)
    gate, bias, amplitude = (torch.randn(s, device=DEVICE).requires_grad_() for s in ((2, 20, 2, 16), (2, 16), (2, 16)))
    position, mask = torch.arange(20, device=DEVICE).expand(2, -1), torch.ones(2, 20, device=DEVICE, dtype=torch.bool)
    torch.library.opcheck(gates_forward, (gate, bias, amplitude, position, mask, 2, 10, 1.0))
    torch.library.opcheck(gates_forward, (gate, None, None, None, None, 0, 0, 8.0))
