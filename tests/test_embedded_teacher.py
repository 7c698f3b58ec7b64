"""The demo's teacher and texts as shipped: small, loadable offline, as good as their card says."""

import json
import re
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralForCausalLM

DEMO = Path(__file__).parents[1] / "recipes" / "demo"
TEACHER, DATA = DEMO / "teacher", DEMO / "data"


@pytest.fixture(scope="module", autouse=True)
def scripts_importable():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DEMO)
        yield


@pytest.fixture(scope="module")
def record() -> dict:
    return json.loads((TEACHER / "training.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TEACHER, local_files_only=True)


@pytest.fixture(scope="module")
def model():
    options = {"local_files_only": True, "trust_remote_code": False}
    return AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32, **options).eval()


def texts(split: str) -> list[str]:
    return pyarrow.parquet.read_table(DATA / f"{split}.parquet").column("text").to_pylist()


def test_whole_folder_stays_under_ten_megabytes():
    sizes = {p: p.stat().st_size for p in DEMO.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert sum(sizes.values()) <= 10_000_000


def test_teacher_is_a_mistral_with_grouped_queries_and_tied_embeddings(model, record):
    assert type(model) is MistralForCausalLM
    assert model.config.num_attention_heads == 4 * model.config.num_key_value_heads
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(p.numel() for p in model.parameters()) == record["model"]["parameters"]
    assert AutoModelForCausalLM.from_pretrained(TEACHER).dtype == torch.bfloat16


def test_loss_is_what_the_card_states(model, tokenizer, record):
    from train_teacher import encode, evaluate

    stream = np.concatenate(encode(tokenizer, texts("validation")))
    stated = record["validation"]
    assert len(stream) > stated["windows"] * 2048, "the slice is too short for the protocol"
    assert np.mean(stated["loss_by_window"]) == pytest.approx(stated["loss"], abs=1e-4)
    measured = evaluate(model, tokenizer, stream, windows=4)
    assert measured["loss_by_window"] == pytest.approx(stated["loss_by_window"][:4], abs=2e-3)


def test_far_repeats_follow_their_definition():
    from train_teacher import far_repeats

    inputs = np.array([7, 8, 9] + [1] * 6 + [7, 9, 7])
    targets = np.array([500, 500, 200] + [2] * 6 + [500, 200, 500])
    # (7, 500) returns after 9 positions, then after 2; (9, 200) returns after 8 but its target id is too small
    assert far_repeats(inputs, targets, gap=8, first_id=300).nonzero()[0].tolist() == [9]
    assert far_repeats(inputs, targets, gap=9, first_id=300).sum() == 0


def test_card_is_generated_from_the_record(record):
    from teacher_card import card

    assert (TEACHER / "README.md").read_text(encoding="utf-8") == card(record)


@pytest.mark.parametrize(
    "text", ["  two  spaces\n\n\ttab ", "naïve “quotes” — 漢字 🙂", "x = 1234 +\x00\r\n0xFF", "</s", ""]
)
def test_tokenizer_round_trip(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id == 1
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_tokenizer_is_fast_with_mistral_special_ids(tokenizer, record):
    assert tokenizer.is_fast
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert len(tokenizer) == record["model"]["vocabulary"]


@pytest.mark.parametrize("prompt", ["She opened the door and", "The old gentleman looked at her and"])
def test_prose_samples_are_made_of_varied_english_words(model, tokenizer, prompt):
    from train_teacher import sample

    known = set(re.findall(r"[a-z]+", " ".join(texts("train")).lower()))
    text = sample(model, tokenizer, prompt, seed=0)
    assert text.startswith(prompt)
    words = re.findall(r"[a-z]+", text.removeprefix(prompt).lower())
    assert len(words) >= 30, text
    assert len(set(words)) >= 0.4 * len(words), f"repeats itself: {text}"
    assert sum(word in known for word in words) >= 0.85 * len(words), text


def test_slices_load_with_datasets_and_hold_enough(tokenizer, tmp_path):
    from train_teacher import encode

    loaded = datasets.load_dataset(str(DATA), cache_dir=str(tmp_path))
    assert set(loaded) == {"train", "validation"}
    assert loaded["train"].column_names == ["text"]
    assert sum(map(len, encode(tokenizer, loaded["train"]["text"]))) >= 600_000
    assert not set(loaded["train"]["text"]) & set(loaded["validation"]["text"])
