"""Packed rows: what they hold, that documents do not see each other, and that a state resumes them exactly."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from t2r.errors import InputError
from t2r.recipe.schema import DataSource
from t2r.train.documents import open_source
from t2r.train.objectives import count, token_loss
from t2r.train.packing import IGNORE, Batches, Loader, PackedRows, collate, encode, validation_windows

LENGTH = 32


class Texts:
    """A source of given documents."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def open(self, order: Any, cursor: Any) -> "TextReader":
        return TextReader(self.texts, cursor or 0)


class TextReader:
    def __init__(self, texts: list[str], place: int) -> None:
        self.texts, self.place = texts, place

    def cursor(self) -> int:
        return self.place

    def __next__(self) -> str:
        if self.place == len(self.texts):
            raise StopIteration
        self.place += 1
        return self.texts[self.place - 1]


def rows_of(texts: list[str], tokenizer: Any, *, block: int = 0, state: Any = None, length: int = LENGTH) -> PackedRows:
    return PackedRows(Texts(texts), tokenizer, length=length, seed=0, block=block, state=state)


@given(texts=st.lists(st.text("abc", min_size=1, max_size=50), min_size=1, max_size=12), length=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_rows_are_the_joined_documents(tokenizer: Any, texts: list[str], length: int) -> None:
    documents = encode(tokenizer, texts)
    joined = np.concatenate(documents * 200)[: 4 * length + 1]
    ends = np.cumsum([len(document) for document in documents * 200])
    for number, (_, row) in enumerate(islice(rows_of(texts, tokenizer, length=length), 4)):
        begin = number * length
        np.testing.assert_array_equal(row.input_ids, joined[begin : begin + length])
        for t in range(length):
            last_of_document = begin + t + 1 in ends
            assert row.labels[t] == (IGNORE if last_of_document else joined[begin + t + 1])
            starts = t == 0 or begin + t in ends
            assert row.position_ids[t] == (0 if starts else row.position_ids[t - 1] + 1)


def test_documents_carry_bos_and_eos(tokenizer: Any) -> None:
    ids = encode(tokenizer, ["ab", "c"])
    assert [int(i[0]) for i in ids] == [1, 1]
    assert [int(i[-1]) for i in ids] == [2, 2]
    assert [len(i) for i in ids] == [4, 3]


def test_batches_bound_documents_in_the_flattened_rows(tokenizer: Any) -> None:
    rows = [row for _, row in islice(rows_of(["a" * 10, "b" * 40, "c"], tokenizer), 3)]
    batch = collate(rows)
    bounds = batch["cu_seq_lens_q"]
    assert bounds.dtype == torch.int32
    assert bounds[0] == 0
    assert bounds[-1] == 3 * LENGTH
    assert {0, LENGTH, 2 * LENGTH} <= set(bounds.tolist())
    starts = (batch["position_ids"].flatten() == 0).nonzero().flatten()
    assert bounds[:-1].tolist() == starts.tolist()


@pytest.mark.parametrize("block", [0, 5])
def test_a_state_resumes_at_the_very_next_row(tokenizer: Any, block: int) -> None:
    texts = [f"{i} " * (3 * i % 41 + 1) for i in range(23)]
    whole = list(islice(rows_of(texts, tokenizer, block=block), 60))
    for cut in (1, 7, 30, 59):
        state = json.loads(json.dumps(whole[cut - 1][0]))
        resumed = islice(rows_of(texts, tokenizer, block=block, state=state), 60 - cut)
        for (_, expected), (_, row) in zip(whole[cut:], resumed, strict=True):
            np.testing.assert_array_equal(row.input_ids, expected.input_ids)
            np.testing.assert_array_equal(row.labels, expected.labels)


def test_epochs_are_permuted_differently_and_the_seed_decides(tokenizer: Any) -> None:
    texts = [chr(ord("A") + i) * 30 for i in range(20)]

    def order(seed: int, number: int = 40) -> list[int]:
        rows = PackedRows(Texts(texts), tokenizer, length=LENGTH, seed=seed, block=8, state=None)
        return [int(row.input_ids[1]) for _, row in islice(rows, number)]

    first = order(0)
    assert order(0) == first
    assert order(1) != first
    assert sorted(first[:20]) == sorted(first[20:])
    assert first[:20] != first[20:]
    blocks = [sorted(first[:8]), sorted(first[8:16])]
    assert [blocks[0].index(x) for x in first[:8]] != [blocks[1].index(x) for x in first[8:16]]


def test_the_end_of_the_data_is_told_when_the_rows_reach_it(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    texts = [chr(ord("A") + i) * 30 for i in range(20)]  # a row each, and far fewer characters than are read ahead
    rows = iter(rows_of(texts, tokenizer, block=0))
    for _ in range(19):
        next(rows)
    assert not caplog.messages
    for _ in range(3):
        next(rows)
    assert caplog.messages == ["The training data was read to its end; epoch 2 begins."]


def test_processes_share_the_rows_of_one(tokenizer: Any) -> None:
    texts = [f"{i} " * 20 for i in range(30)]
    one = list(islice(Batches(rows_of(texts, tokenizer), size=2, rank=0, world=1), 12))
    shares = [list(islice(Batches(rows_of(texts, tokenizer), size=2, rank=r, world=2), 6)) for r in (0, 1)]
    for step in range(6):
        for rank in (0, 1):
            batch, state = shares[rank][step]
            assert torch.equal(batch["input_ids"], one[2 * step + rank][0]["input_ids"])
            assert state == one[2 * step + 1][1]


@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader_knows_the_state_of_the_batch_it_gave(tokenizer: Any, text_file: Path, workers: int) -> None:
    source = open_source(DataSource(source=[str(text_file)]))

    def batches(state: Any = None) -> Batches:
        rows = PackedRows(source, tokenizer, length=LENGTH, seed=0, block=16, state=state)
        return Batches(rows, size=2, rank=0, world=1)

    loader = Loader(batches(), workers=workers)
    random_state = torch.get_rng_state()
    given = list(islice(loader, 5))
    assert torch.equal(torch.get_rng_state(), random_state)
    following = next(iter(Loader(batches(loader.state), workers=0)))
    expected = [batch for batch, _ in islice(batches(), 6)]
    for batch, wanted in zip([*given, following], expected, strict=True):
        assert torch.equal(batch["input_ids"], wanted["input_ids"])


def test_a_source_without_documents_is_told(tokenizer: Any) -> None:
    with pytest.raises(InputError, match="holds no document"):
        next(iter(rows_of([], tokenizer)))


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_packing_never_leaks(models_pair: tuple[Any, Any], tokenizer: Any, which: str) -> None:
    """A document's loss is what it is alone, whatever stands around it in the row."""
    model = models_pair[which == "student"]
    document = "the document in the middle"
    length = len(document) + 2

    def losses(texts: list[str]) -> torch.Tensor:
        row = next(iter(rows_of(texts, tokenizer, length=96)))[1]
        begin = int(np.flatnonzero(row.position_ids == 0)[texts.index(document)])
        kept = np.full_like(row.labels, IGNORE)
        kept[begin : begin + length] = row.labels[begin : begin + length]
        row.labels = kept
        batch = collate([row])
        assert count(batch) == length - 1
        with torch.no_grad():
            return token_loss(model, batch)

    alone = losses([document, "x" * 200])
    torch.testing.assert_close(losses(["before it " * 3, document, "y" * 200]), alone, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(losses(["q", "zz", document, "z" * 200]), alone, rtol=1e-5, atol=1e-4)


def test_validation_windows_follow_the_protocol(tokenizer: Any) -> None:
    texts = ["abcdef", "gh" * 20, "ijk"]
    joined = np.concatenate(encode(tokenizer, texts))
    windows = validation_windows(texts, tokenizer, length=10, count=100)
    assert len(windows) == (len(joined) - 1) // 10
    for i, row in enumerate(windows):
        np.testing.assert_array_equal(row.input_ids, joined[10 * i : 10 * i + 10])
        np.testing.assert_array_equal(row.labels, joined[10 * i + 1 : 10 * i + 11])
        np.testing.assert_array_equal(row.position_ids, np.arange(10))
    assert len(validation_windows(texts, tokenizer, length=10, count=2)) == 2
    with pytest.raises(InputError, match="fewer than one window"):
        validation_windows(["a"], tokenizer, length=10, count=1)
