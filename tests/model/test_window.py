"""Attention over sinks and window, block by block, is the masked attention that defines it."""

import pytest
import torch

from t2r.model.mixers.window import Window
from t2r.model.sequence import SequenceInfo

ROWS, HEADS, GROUP, DIM = 3, 2, 2, 8


def sequences(length):
    """Whole rows, packed documents, and padding on the left, on the right and anywhere."""
    column = torch.arange(length)
    bounds = sorted({0, 1, 5, 23, 24, length - 1, length, 2 * length, ROWS * length})
    yield {}
    yield {"cu_seqlens": torch.tensor([b for b in bounds if b <= ROWS * length], dtype=torch.int32)}
    lengths = torch.tensor([length, length // 2, 1])[:, None]
    for mask in (column < lengths, column >= length - lengths, torch.rand(ROWS, length) > 0.4):
        yield {"attention_mask": mask.long()}


@pytest.mark.parametrize("sinks", [0, 1, 4, 11])
@pytest.mark.parametrize("size", [1, 5, 16, 20])
def test_blocks_equal_the_whole(sinks, size):
    torch.manual_seed(0)
    window = Window(sinks, size)
    for length in (1, 17, 63, 100):
        q, k, v = (torch.randn(ROWS, length, h, DIM, dtype=torch.float64) for h in (GROUP * HEADS, HEADS, HEADS))
        for arguments in sequences(length):
            info = SequenceInfo.build(ROWS, length, q.device, **arguments)
            for seen in (None, 0, 3, 9, 30) if info.cu_seqlens is None else (None,):
                states, here = None, info
                if seen is not None:  # slots of tokens before; what stands in an empty slot must not matter
                    states = tuple(torch.randn(ROWS, HEADS, sinks + size, DIM, dtype=torch.float64) for _ in "kv")
                    before = torch.tensor([seen, max(seen - 1, 0), seen + 7])
                    here = SequenceInfo(info.position + before[:, None], info.mask)
                expected, found = (
                    run(q, k, v, here, states, 0.3) for run in (window.attend_whole, window.attend_blocks)
                )
                assert found.isfinite().all()
                real = slice(None) if info.mask is None else info.mask
                torch.testing.assert_close(found[real], expected[real], atol=1e-12, rtol=0)


def test_gradients_equal_the_wholes():
    torch.manual_seed(0)
    inputs = [
        torch.randn(1, 90, h, DIM, dtype=torch.float64, requires_grad=True) for h in (GROUP * HEADS, HEADS, HEADS)
    ]
    info = SequenceInfo.build(1, 90, inputs[0].device, cu_seqlens=torch.tensor([0, 3, 50, 90], dtype=torch.int32))
    window, upstream = Window(3, 20), torch.randn(1, 90, GROUP * HEADS, DIM, dtype=torch.float64)
    expected, found = (
        torch.autograd.grad(run(*inputs, info, None, 0.3), inputs, upstream)
        for run in (window.attend_whole, window.attend_blocks)
    )
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
