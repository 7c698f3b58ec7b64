"""Every mixer in bfloat16 on a GPU, as near to float32 as bfloat16 comes, however the sequence is cut or padded."""

import copy

import pytest
import torch
from transformers import MistralConfig

from t2r.model import StudentCache
from tests.model.conftest import MIXERS, SHAPE, build

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="SKIPPED FOR LACK OF A GPU: mixers in bfloat16"),
]
WIDE = {**SHAPE, "hidden_size": 256, "num_hidden_layers": 3, "num_key_value_heads": 2, "initializer_range": 0.05}


@pytest.fixture(scope="module")
def pair():
    """pair(mixer) -> a student in float32 on the CPU and its copy in bfloat16 on the GPU; heads of 64."""
    made = {}

    def get(mixer):
        if mixer not in made:
            exact = build(MistralConfig(**WIDE, head_dim=64, sliding_window=None), MIXERS[mixer])
            exact = exact.to(torch.bfloat16).float()  # the same weights in both
            made[mixer] = exact, copy.deepcopy(exact).to("cuda", torch.bfloat16)
        return made[mixer]

    return get


def distance(a, b):
    a, b = a.float().cpu(), b.float().cpu()
    return ((a - b).norm() / b.norm()).item()


def test_bfloat16_is_near_float32(pair, mixer, tokens):
    exact, rounded = pair(mixer)
    text = tokens(2, 200)
    loss = exact(text, labels=text, use_cache=False).loss
    loss.backward()
    found = rounded(text.cuda(), labels=text.cuda(), use_cache=False)
    found.loss.backward()
    assert abs(found.loss.item() - loss.item()) < 0.02
    with torch.no_grad():
        assert distance(found.logits, exact(text, use_cache=False).logits) < 0.05
    gradients = dict(rounded.named_parameters())
    for name, parameter in exact.named_parameters():
        assert gradients[name].grad.isfinite().all(), name
        assert distance(gradients[name].grad, parameter.grad) < 0.3, name
    exact.zero_grad()
    rounded.zero_grad()


@torch.no_grad()
def test_pieces_and_left_padding_change_little(pair, mixer, tokens):
    exact, rounded = pair(mixer)
    text = tokens(3, 80)
    mask = torch.ones_like(text)
    mask[1, :33], mask[2, :78] = 0, 0
    text = text.masked_fill(mask == 0, 0)
    cache, logits, end = StudentCache(rounded.config), [], 0
    for piece in text.split([41, 1, 35, 1, 1, 1], 1):
        end += piece.shape[1]
        logits.append(rounded(piece.cuda(), attention_mask=mask[:, :end].cuda(), past_key_values=cache).logits)
    whole = torch.cat(logits, 1)
    assert whole.isfinite().all()
    for row in range(3):
        seen = mask[row] == 1
        assert distance(whole[row, seen.cuda()], exact(text[row][seen][None], use_cache=False).logits[0]) < 0.05
