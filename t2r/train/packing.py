"""Rows of tokens from documents: tokenised, packed to length, in an order that a seed fixes and a checkpoint resumes.

Every document becomes [BOS] tokens [EOS]; documents follow each other without gaps and rows are cut from them. A
document that a row boundary cuts goes on in the next row as if it began there: position 0, empty state, no look back.
"""

import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from t2r.errors import InputError
from t2r.train.documents import Reader, Source

logger = logging.getLogger(__name__)

IGNORE = -100
_BLOCK_CHARACTERS = 1 << 26
_TOKENISE_CHARACTERS = 1 << 18

State = dict[str, Any]


class DocumentStream:
    """Endless documents: epoch after epoch, permuted in blocks by a seed.

    Iterating gives (state, text); a stream built with that state starts again at that very document.

    Args:
        block: documents held and permuted at a time (0: no permutation, of files neither).
    """

    def __init__(self, source: Source, *, seed: int, block: int, state: State | None = None) -> None:
        self._source = source
        self._seed = seed
        self._block = block
        self._state = state or {"epoch": 0, "block": 0, "cursor": None, "index": 0}

    def __iter__(self) -> Iterator[tuple[State, str]]:
        epoch, number, index = (self._state[key] for key in ("epoch", "block", "index"))
        cursor = self._state["cursor"]
        while True:
            order = np.random.default_rng([self._seed, epoch]) if self._block else None
            reader = self._source.open(order, cursor)
            empty = cursor is None
            cursor = reader.cursor()
            while texts := _take(reader, self._block or 256):
                empty = False
                places = np.arange(len(texts))
                if self._block:
                    np.random.default_rng([self._seed, epoch, number]).shuffle(places)
                for place in range(index, len(texts)):
                    yield {"epoch": epoch, "block": number, "cursor": cursor, "index": place}, texts[places[place]]
                cursor, number, index = reader.cursor(), number + 1, 0
            if empty:
                raise InputError("data.source: holds no document")
            epoch, number, cursor, index = epoch + 1, 0, None, 0


def _take(reader: Reader, limit: int) -> list[str]:
    """Up to `limit` documents, fewer when they are very long."""
    texts: list[str] = []
    characters = 0
    while len(texts) < limit and characters < _BLOCK_CHARACTERS and (text := next(reader, None)) is not None:  # type: ignore[call-overload]
        texts.append(text)
        characters += len(text)
    return texts


def encode(tokenizer: Any, texts: list[str]) -> list[np.ndarray]:
    """Token ids of documents, each with its BOS and EOS where the tokenizer has them; int64 [length] each."""
    before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    after = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return [np.array([*before, *ids, *after], dtype=np.int64) for ids in encoded]


@dataclass
class Row:
    """T tokens. labels[t] is the token after input_ids[t], or -100 where that belongs to another document."""

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray


@dataclass
class _Piece:
    state: State
    ids: np.ndarray
    offset: int


class PackedRows:
    """Endless packed rows of `length` tokens.

    Iterating gives (state, row), the state being where the *next* row starts: a document and a number of its tokens.
    """

    def __init__(
        self, source: Source, tokenizer: Any, *, length: int, seed: int, block: int, state: State | None = None
    ) -> None:
        self._documents = DocumentStream(source, seed=seed, block=block, state=state and state["document"])
        self._tokenizer = tokenizer
        self._length = length
        self._offset = state["offset"] if state else 0

    def __iter__(self) -> Iterator[tuple[State, Row]]:
        pieces: deque[_Piece] = deque()
        held = 0
        for piece in self._pieces():
            pieces.append(piece)
            held += len(piece.ids) - piece.offset
            # One token more than the row: the last position's label.
            while held > self._length:
                row = _cut(pieces, self._length)
                held -= self._length
                yield {"document": pieces[0].state, "offset": pieces[0].offset}, row

    def _pieces(self) -> Iterator[_Piece]:
        waiting: list[tuple[State, str]] = []
        characters = 0
        offset = self._offset
        epoch: int | None = None
        for state, text in self._documents:
            waiting.append((state, text))
            characters += len(text)
            if characters >= _TOKENISE_CHARACTERS or len(waiting) >= 64:
                for (at, _), ids in zip(waiting, encode(self._tokenizer, [t for _, t in waiting]), strict=True):
                    if epoch is not None and at["epoch"] > epoch:  # here, as documents are read ahead of the rows
                        logger.warning("The training data was read to its end; epoch %d begins.", at["epoch"] + 1)
                    epoch = at["epoch"]
                    yield _Piece(at, ids, offset)
                    offset = 0
                waiting, characters = [], 0


def _cut(pieces: deque[_Piece], length: int) -> Row:
    """Take `length` tokens from the front of `pieces`, leaving at least one token there."""
    ids, starts, filled = [], [0], 0
    while filled < length:
        piece = pieces[0]
        part = piece.ids[piece.offset : piece.offset + length - filled]
        ids.append(part)
        filled += len(part)
        piece.offset += len(part)
        if piece.offset == len(piece.ids):
            pieces.popleft()
            starts.append(filled)
    inputs = np.concatenate(ids)
    labels = np.full(length, IGNORE, dtype=np.int64)
    labels[:-1] = inputs[1:]
    # starts[1:] are the ends of the documents that end in this row; their last token has no next one.
    labels[[end - 1 for end in starts[1:]]] = IGNORE
    if starts[-1] != length:
        labels[-1] = pieces[0].ids[pieces[0].offset]
        starts.append(length)
    lengths = np.diff(starts)
    return Row(inputs, labels, np.arange(length) - np.repeat(starts[:-1], lengths))


def collate(rows: list[Row]) -> dict[str, torch.Tensor]:
    """A batch of B rows: input_ids, labels, position_ids [B, T] int64, and cu_seq_lens_q [N + 1] int32, the bounds of
    the documents among the B*T tokens taken row after row."""
    batch = {
        name: torch.from_numpy(np.stack([getattr(row, name) for row in rows]))
        for name in ("input_ids", "labels", "position_ids")
    }
    starts = torch.nonzero(batch["position_ids"].flatten() == 0).flatten()
    total = torch.tensor([batch["position_ids"].numel()])
    return {**batch, "cu_seq_lens_q": torch.cat([starts, total]).to(torch.int32)}


def validation_windows(texts: list[str], tokenizer: Any, *, length: int, count: int) -> list[Row]:
    """The first `count` windows of `length` inputs over all documents joined in order, read across their boundaries.

    The protocol of `t2r eval`: every position has a label and positions do not restart at documents.
    """
    ids = np.concatenate([np.zeros(0, dtype=np.int64), *encode(tokenizer, texts)])
    number = min(count, (len(ids) - 1) // length)
    if number < 1:
        raise InputError(f"data.validation: {len(ids)} tokens, fewer than one window of {length}")
    positions = np.arange(length)
    return [
        Row(ids[i * length : (i + 1) * length], ids[i * length + 1 : (i + 1) * length + 1], positions)
        for i in range(number)
    ]


class Batches(torch.utils.data.IterableDataset):
    """Micro-batches of one process, each with the state of the stream after it.

    Every process reads the same rows and keeps each `world`-th micro-batch: the micro-batches of an optimiser step do
    not depend on how many processes share them, so a run may be resumed on another number.
    """

    def __init__(self, rows: PackedRows, *, size: int, rank: int, world: int) -> None:
        self._rows = rows
        self._size = size
        self._rank = rank
        self._world = world

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], State]]:
        kept: list[Row] = []
        for number, (state, row) in enumerate(self._rows, 1):
            if (number - 1) // self._size % self._world == self._rank:
                kept.append(row)
            if number % (self._size * self._world) == 0:
                yield collate(kept), state
                kept = []


class Loader:
    """What the trainer iterates: micro-batches, with `state` following the last one handed out.

    Args:
        workers: 0 reads in this process; 1 reads ahead in another, worth it when an accelerator computes.
    """

    def __init__(self, batches: Batches, *, workers: int) -> None:
        # A generator of its own: a DataLoader draws a seed when it starts, and that must not move the global state.
        self._loader = torch.utils.data.DataLoader(
            batches, batch_size=None, num_workers=workers, collate_fn=_as_is, generator=torch.Generator()
        )
        self.state: State | None = None

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for batch, state in self._loader:
            self.state = state
            yield batch


def _as_is(item: Any) -> Any:
    return item
