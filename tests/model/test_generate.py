"""Text from a model, piece by piece, in constant memory."""

import copy

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoTokenizer

from t2r.errors import InputError
from t2r.generate import Spelling, Statistics, generate


@pytest.fixture(scope="module")
def tokenizer(embedded_teacher):
    return AutoTokenizer.from_pretrained(embedded_teacher)


@pytest.fixture
def model(students, tokenizer):
    """A student with the demo's vocabulary, that never ends its text."""
    torch.manual_seed(0)
    model = copy.deepcopy(students())
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.generation_config.eos_token_id = None
    return model


def test_pieces_spell_what_transformers_generates(model, tokenizer):
    prompt, options = "The naïve café — 東京 🙂", {"max_new_tokens": 40, "do_sample": False}
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    whole = model.generate(ids, **options)[0]
    expected = tokenizer.decode(whole, skip_special_tokens=True)[
        len(tokenizer.decode(ids[0], skip_special_tokens=True)) :
    ]
    assert "".join(generate(model, tokenizer, prompt, max_new_tokens=40, temperature=0)) == expected


def test_spelling_holds_characters_back_until_they_are_whole(tokenizer):
    text = "naïve café 🙂 東京\n\n  twice  spaced"
    ids = tokenizer(text)["input_ids"]
    spelling = Spelling(tokenizer, ids[:1])
    pieces = [spelling.add(token) for token in ids[1:]]
    assert "".join(pieces) + spelling.finish() == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_the_same_seed_gives_the_same_text(model, tokenizer):
    texts = ["".join(generate(model, tokenizer, "One", max_new_tokens=12, seed=seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert len("".join(generate(model, tokenizer, "One", max_new_tokens=3, top_k=5, top_p=1.0))) > 0


def test_the_state_is_as_large_after_4096_tokens_as_after_64(model, tokenizer, monkeypatch):
    sizes = []
    monkeypatch.setattr("t2r.generate.PREFILL_TOKENS", 500)
    for new, prompt in ((64, "One"), (600, "One"), (64, "One two three " * 1400)):
        told = Statistics()
        for _ in generate(model, tokenizer, prompt, max_new_tokens=new, temperature=0, statistics=told):
            pass
        assert told.new_tokens == new
        sizes.append(told.state_bytes)
    assert told.prompt_tokens > 4096
    assert len(set(sizes)) == 1


def test_a_long_prompt_in_pieces_is_the_same_prompt(model, tokenizer, monkeypatch):
    prompt = "It was a cold evening, and the rain had not stopped. " * 5
    whole = list(generate(model, tokenizer, prompt, max_new_tokens=10, temperature=0))
    monkeypatch.setattr("t2r.generate.PREFILL_TOKENS", 7)
    assert list(generate(model, tokenizer, prompt, max_new_tokens=10, temperature=0)) == whole


def test_the_end_of_text_token_ends_it_and_is_not_shown(model, tokenizer):
    ids = tokenizer("One", return_tensors="pt")["input_ids"]
    text = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :].tolist()
    model.generation_config.eos_token_id = [text[3]]
    told = Statistics()
    shown = "".join(generate(model, tokenizer, "One", temperature=0, statistics=told))
    assert told.new_tokens == text.index(text[3]) + 1
    assert shown == "".join(generate(model, tokenizer, "One", temperature=0, max_new_tokens=text.index(text[3])))


def test_an_empty_prompt_needs_a_first_token(model, tokenizer):
    class Bare:
        def __call__(self, prompt, **kwargs):
            return {"input_ids": torch.empty(1, 0, dtype=torch.long)}

    with pytest.raises(InputError, match="prompt: empty"):
        next(generate(model, Bare(), ""))
    assert next(generate(model, tokenizer, "", max_new_tokens=4))


def test_command_line(model, tokenizer, tmp_path):
    from t2r.cli.generate import command

    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    arguments = [str(tmp_path), "--max-new-tokens", "6", "--temperature", "0", "--device", "cpu"]
    from_option = CliRunner().invoke(command, [*arguments, "--prompt", "One two"])
    from_stdin = CliRunner().invoke(command, arguments, input="One two")
    assert from_option.exit_code == 0, from_option.output
    expected = "".join(generate(model, tokenizer, "One two", max_new_tokens=6, temperature=0))
    assert from_option.stdout == from_stdin.stdout == expected + "\n"
    garbled = CliRunner().invoke(command, arguments, input=b"One \xff two")
    assert "standard input is not UTF-8 text" in str(garbled.exception)
    assert "new: 6 tokens" in from_option.stderr
    for option in ("--temperature", "--top-p"):
        refused = CliRunner().invoke(command, [*arguments, option, "nan"], input="One two")
        assert refused.exit_code == 2
        assert "'nan' is not a finite number" in refused.stderr
