"""gla as torch operators: one node of a compiled graph, with values and gradients as in eager mode."""

import pytest
import torch

from t2r_kernels import gla
from t2r_kernels.gla.operators import gla_backward, gla_forward

from .cases import bounds
from .test_gla import SIDES, gla_inputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKEND = "triton" if torch.cuda.is_available() else "torch"
NAMES = ("q", "k", "v", "log_decay", "write", "state")


def leaves(side, seed, documents=None):
    x = gla_inputs(side, "mild", seed, tokens=20, documents=documents, dim_k=32, dim_v=16)
    return {name: x[name].to(DEVICE).requires_grad_() for name in NAMES if name in x}


@pytest.mark.parametrize("documents", [None, (9, 0, 11)])
@pytest.mark.parametrize("side", SIDES)
def test_gla_compiles_into_one_graph(side, documents, seed):
    x = leaves(side, seed, documents)
    cu_seqlens = None if documents is None else bounds(documents).to(DEVICE)

    def loss(*args):
        named = dict(zip(x, args, strict=True))
        state = named.pop("state")
        o, final = gla(**named, gate=side, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens)
        return o.square().sum() + final.square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(f(*x.values()), list(x.values())) for f in (compiled, loss))
    torch.testing.assert_close(got, want)


def test_only_what_is_asked_for_in_a_graph(seed):
    """No state, gate nor weight in, no state out, under autocast."""
    q, k, v, *_ = leaves(None, seed).values()

    def loss(q, k, v):
        with torch.autocast(DEVICE, torch.bfloat16):
            return gla(q, k, v)[0].square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(f(q, k, v), (q, k, v)) for f in (compiled, loss))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("side", SIDES)
def test_operators_keep_their_contract(side, with_state, seed):
    """torch's own check: schema, fake kernels, autograd registration."""
    x = leaves(side, seed)
    args = [x.get(name) for name in NAMES]
    args[-1] = args[-1] if with_state else None
    torch.library.opcheck(gla_forward, (*args, None, side, 0.2, with_state, BACKEND))
    inputs = [y if y is None else y.detach() for y in args]
    upstream = torch.ones(*x["q"].shape[:3], x["v"].shape[-1], device=DEVICE)
    dfinal = torch.ones_like(x["state"]) if with_state else None
    torch.library.opcheck(gla_backward, (upstream, dfinal, *inputs, None, side, 0.2, BACKEND))
