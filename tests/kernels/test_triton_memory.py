"""No kernel touches memory outside its tensors: `memcheck.py`, which looks on in every test of Triton's interpreter,
sees it where one does; and the general path of gsa, in pieces, at the sizes of real heads."""

import os

import pytest
import torch

from t2r_kernels import gsa

from .cases import gsa_call, gsa_inputs, run

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="runs through test_triton_interpreter.py"
)


@triton.jit
def copy_kernel(x, y, N, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i + SHIFT, mask=i < N, other=0), mask=i < N)


def test_what_lies_outside_is_seen():
    whole = torch.arange(100.0)
    x, y = whole[10:90], torch.zeros(80)
    copy_kernel[(1,)](x, y, 80, 0, 128)
    assert torch.equal(x, y)
    for inputs in ((x, y, 81, 0), (x, y, 80, 1), (x, y, 80, -1), (x, y[1:], 80, 0), (x[1:], y, 80, 0)):
        with pytest.raises(triton.runtime.errors.InterpreterError, match="accesses outside a torch"):
            copy_kernel[(1,)](*inputs, 128)


def test_gsa_in_pieces(seed):
    """What `test_small_for_a_sanitizer` runs on a GPU."""
    inputs = gsa_inputs("mild", seed, documents=(0, 1, 20), heads=1, dim_k=128, dim_v=128, slots=100)
    run(gsa_call(gsa, (0, 1, 20), backend="triton"), inputs, seed)
