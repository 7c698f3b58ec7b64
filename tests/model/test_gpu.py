"""Every mixer in bfloat16 on a GPU, as near to float32 as bfloat16 comes, however the sequence is cut or padded, and
decoding the same whether its step is recorded or not."""

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


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 7}], ids=["whole", "chunks"])
def test_a_recorded_step_is_the_step(pair, mixer, tokens, options, monkeypatch):
    """generate replays a CUDA graph; it says the same without one."""
    rounded = pair(mixer)[1]
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(1), replay(graph)))
    text = tokens(2, 30).cuda()
    mask = torch.ones_like(text)
    mask[1, :13] = 0
    wanted = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    wanted |= {"attention_mask": mask, "output_logits": True, "return_dict_in_generate": True}
    recorded = rounded.generate(text, **wanted)
    constant = None not in rounded.config.mixers
    assert bool(replays) == constant
    replays.clear()
    plain = rounded.generate(text, disable_compile=True, **wanted)
    assert not replays
    assert torch.equal(recorded.sequences, plain.sequences)
    assert distance(torch.stack(recorded.logits), torch.stack(plain.logits)) < 1e-3
    if constant:
        assert torch.equal(recorded.past_key_values.seen, plain.past_key_values.seen)
        for a, b in zip(recorded.past_key_values.layers, plain.past_key_values.layers, strict=True):
            assert all(distance(x, y) < 1e-3 for x, y in zip(a.states, b.states, strict=True))
