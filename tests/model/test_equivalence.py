"""One sequence, however it is cut, padded or packed, gives the same logits and the same state."""

import pytest
import torch

from t2r.model import RecurrentLayer, StudentCache

CLOSE = {"atol": 3e-5, "rtol": 1e-4}
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def run(model, pieces, mask=None):
    """Logits and cache after feeding the pieces [B, T_i] one by one; `mask` covers all columns."""
    cache, logits, end = StudentCache(model.config), [], 0
    for piece in pieces:
        end += piece.shape[1]
        seen = None if mask is None else mask[:, :end]
        logits.append(model(piece, attention_mask=seen, past_key_values=cache, use_cache=True).logits)
    return torch.cat(logits, 1), cache


def states(cache):
    return [x for layer in cache.layers if isinstance(layer, RecurrentLayer) for x in layer.states]


def test_whole_equals_splits_equals_steps(student, tokens):
    text = tokens(2, 23)
    whole, cache = run(student, [text])
    torch.testing.assert_close(student(text, use_cache=False).logits, whole, **CLOSE)
    for lengths in ([1] * 23, [7, 16], [1, 21, 1], [12, 1, 1, 9]):
        logits, split = run(student, text.split(lengths, 1))
        torch.testing.assert_close(logits, whole, **CLOSE)
        torch.testing.assert_close(states(split), states(cache), **CLOSE)
        assert split.get_seq_length() == 23


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_single_sequences(student, tokens, side):
    text, lengths = tokens(3, 19), [19, 11, 2]
    mask = torch.zeros(3, 19, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, 19 - length :] = 1
    if side == "right":
        mask = mask.flip(1)
    padded = text.masked_fill(mask == 0, 0)
    for pieces in ([padded], padded.split([8, 1, 10], 1)):
        logits, cache = run(student, pieces, mask)
        assert logits.isfinite().all()
        for row in range(3):
            single, alone = run(student, [padded[row][mask[row] == 1][None]])
            torch.testing.assert_close(logits[row][mask[row] == 1], single[0], **CLOSE)
            torch.testing.assert_close([x[row : row + 1] for x in states(cache)], states(alone), **CLOSE)
    assert cache.seen.tolist() == lengths


def test_packed_documents_equal_separate_ones(student, tokens):
    text = tokens(2, 24)
    lengths = [[9, 1, 14], [24]]
    position = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    bounds = torch.tensor([0, 9, 10, 24, 48], dtype=torch.int32)
    separate = [
        torch.cat([student(part).logits for part in text[i : i + 1].split(row, 1)], 1) for i, row in enumerate(lengths)
    ]
    for arguments in ({"cu_seq_lens_q": bounds}, {}):
        packed = student(text, position_ids=position, use_cache=False, **arguments).logits
        torch.testing.assert_close(packed, torch.cat(separate), **CLOSE)


def test_generate_equals_repeated_forwards(student, tokens):
    prompt = tokens(2, 6)
    expected = prompt
    for _ in range(14):
        expected = torch.cat([expected, student(expected, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    options = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": None}
    found = student.generate(prompt, return_dict_in_generate=True, output_logits=True, **options)
    assert torch.equal(found.sequences, expected)
    whole, cache = run(student, [expected[:, :-1]])
    torch.testing.assert_close(torch.stack(found.logits, 1), whole[:, 5:], **CLOSE)
    torch.testing.assert_close(states(found.past_key_values), states(cache), **CLOSE)
    assert torch.equal(student.generate(prompt, prefill_chunk_size=4, **options), expected)


def test_generate_in_a_padded_batch_equals_single_prompts(student, tokens):
    prompt = tokens(2, 9)
    mask = torch.ones_like(prompt)
    mask[1, :4] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    batch = student.generate(prompt.masked_fill(mask == 0, 0), attention_mask=mask, **options)
    assert torch.equal(batch[:1], student.generate(prompt[:1], **options))
    assert torch.equal(batch[1:, 4:], student.generate(prompt[1:, 4:], **options))


def test_beams_and_samples_do_not_depend_on_the_cache(student, tokens):
    prompt = tokens(2, 5)
    options = {"max_new_tokens": 7, "eos_token_id": None}
    for mode in ({"num_beams": 3, "do_sample": False}, {"do_sample": True, "num_return_sequences": 2}):
        torch.manual_seed(3)
        cached = student.generate(prompt, **mode, **options)
        torch.manual_seed(3)
        assert torch.equal(cached, student.generate(prompt, use_cache=False, **mode, **options))


def test_a_cache_can_be_repeated_selected_and_forgotten(students, mixer, tokens):
    model = students("mistral", mixer)
    text = tokens(2, 12)
    _, cache = run(model, [text[:, :8]])
    cache.batch_repeat_interleave(3)
    cache.batch_select_indices(torch.tensor([1, 4]))
    logits = model(text[:, 8:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(logits, model(text).logits[:, 8:], **CLOSE)
    cache.reset()
    torch.testing.assert_close(model(text, past_key_values=cache, use_cache=True).logits, model(text).logits, **CLOSE)
    assert cache.get_seq_length() == 12


def test_contradicting_arguments_are_refused(students, tokens):
    model, text = students(), tokens(1, 4)
    from transformers import DynamicCache

    with pytest.raises(ValueError, match="StudentCache"):
        model(text, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="packed documents"):
        model(text, cu_seq_lens_q=torch.tensor([0, 2, 4]), attention_mask=torch.ones(1, 4))
    with pytest.raises(ValueError, match="attention_mask"):
        model(text, attention_mask=torch.ones(1, 3))
    with pytest.raises(ValueError, match="exactly one"):
        model()
