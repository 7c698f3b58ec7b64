"""Documents of a recipe's data source: local files or a `datasets` name, one after the other, resumable.

A reader gives one pass over a source. Its cursor is plain JSON and says where the next document starts, so a
checkpoint stores a few numbers and no text.
"""

import bz2
import copy
import glob
import gzip
import io
import json
import lzma
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Protocol, cast

import numpy as np

from t2r import hub
from t2r.errors import InputError
from t2r.recipe.schema import Data, DataSource
from t2r.resources import resolve

Cursor = Any
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_KINDS = (".txt", ".jsonl", ".parquet")


class Reader(Protocol):
    """One pass over a source."""

    def cursor(self) -> Cursor:
        """Where the next document starts; a reader opened there gives the same documents."""

    def __next__(self) -> str: ...


class Source(Protocol):
    """Something that can be read once per epoch."""

    def open(self, order: np.random.Generator | None, cursor: Cursor | None) -> Reader:
        """A pass from `cursor` (None: the start), its files in an order drawn from `order` (None: as listed)."""


def open_source(options: DataSource) -> Source:
    """The source that `options.source` names.

    Raises:
        InputError: nothing is there, or it is of no kind that can be read.
    """
    files: list[Path] = []
    for text in options.source:
        found = _local_files(resolve(text))
        if found is None or options.config_name is not None:
            if len(options.source) > 1:
                raise InputError(f"data.source {text}: no such file or folder; a `datasets` name stands alone")
            return HubSource(options)
        files += found
    return FileSource(files, options)


def check_sources(data: Data) -> None:
    """Find training and validation text, and read the first document of each, before anything is written.

    Raises:
        InputError: as `open_source`, or a first document that cannot be read.
    """
    for options in (data, data.validation):
        if options is not None and next(stream_documents(open_source(options)), None) is None:
            raise InputError(f"data.source {', '.join(options.source)}: holds no document")


def stream_documents(source: Source) -> Iterator[str]:
    """Every document of a source once, in its own order."""
    reader = source.open(None, None)
    return iter(lambda: next(reader, None), None)  # type: ignore[arg-type, call-overload, return-value]


def read_documents(options: DataSource) -> list[str]:
    """Every document of a source, in its own order. For validation text, which fits in memory."""
    return list(stream_documents(open_source(options)))


def _local_files(text: str) -> list[Path] | None:
    """Files of a path, folder or glob; None when `text` is none of those."""
    path = Path(text)
    if path.is_file():
        if _kind(path) is None:
            raise InputError(f"{path}: not data that can be read ({', '.join(_KINDS)}, also .gz, .xz, .bz2, .zst)")
        return [path]
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file() and _kind(file))
    elif glob.has_magic(text):
        found = sorted(Path(name) for name in glob.glob(text, recursive=True) if _kind(Path(name)))
    elif _NAME.fullmatch(text) and not text.endswith(_KINDS):
        return None
    else:
        raise InputError(f"data.source {text}: no such file or folder")
    if not found:
        raise InputError(f"data.source {text}: holds no {', '.join(_KINDS)} file")
    return found


def _kind(path: Path) -> str | None:
    suffixes = path.suffixes[-2:]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes = suffixes[:-1]
    return suffixes[-1] if suffixes and suffixes[-1] in _KINDS else None


def _zstd(path: Path) -> IO[bytes]:
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


_COMPRESSED: dict[str, Callable[[Path], IO[bytes]]] = {
    ".gz": gzip.open,  # type: ignore[dict-item]
    ".xz": lzma.open,  # type: ignore[dict-item]
    ".bz2": bz2.open,  # type: ignore[dict-item]
    ".zst": _zstd,
}


class FileSource:
    """Local files, read in turn."""

    def __init__(self, files: list[Path], options: DataSource) -> None:
        self.files = files
        self.options = options

    def open(self, order: np.random.Generator | None, cursor: Cursor | None) -> "FileReader":
        permutation = range(len(self.files)) if order is None else order.permutation(len(self.files))
        return FileReader([self.files[index] for index in permutation], self.options, cursor or [0, 0])


class FileReader:
    """One pass over files. The cursor is [file in this pass, document in that file]; resuming reads up to it."""

    def __init__(self, files: list[Path], options: DataSource, cursor: Cursor) -> None:
        self._files = files
        self._options = options
        self._file, self._document = cursor
        self._documents: Iterator[str] | None = None
        self._skip = self._document

    def cursor(self) -> Cursor:
        return [self._file, self._document]

    def __next__(self) -> str:
        while self._file < len(self._files):
            if self._documents is None:
                self._documents = _documents(self._files[self._file], self._options)
                for _ in range(self._skip):
                    next(self._documents, None)
            for text in self._documents:
                self._document += 1
                return text
            self._file, self._document, self._documents, self._skip = self._file + 1, 0, None, 0
        raise StopIteration


def _documents(path: Path, options: DataSource) -> Iterator[str]:
    """The documents of one file that hold more than white space."""
    kind = _kind(path)
    read = {".txt": _text_documents, ".jsonl": _json_documents, ".parquet": _parquet_documents}[kind or ""]
    try:
        for text in read(path, options):
            if text.strip():
                yield text
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text") from None
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise InputError(f"{path}: cannot be read: {str(error) or type(error).__name__}") from None


def _lines(path: Path) -> Iterator[str]:
    opener = _COMPRESSED.get(path.suffix)
    # The decompressors' own line iteration is Python code, several times slower than a buffer's.
    with io.BufferedReader(cast(io.RawIOBase, opener(path)), 1 << 20) if opener else open(path, "rb") as file:
        for line in file:
            yield line.decode("utf-8")


def _text_documents(path: Path, options: DataSource) -> Iterator[str]:
    if options.document_separator == "none":
        yield "".join(_lines(path))
        return
    lines: list[str] = []
    for line in _lines(path):
        if line.rstrip("\r\n") == "\0":
            yield "".join(lines).removesuffix("\n")
            lines = []
        else:
            lines.append(line)
    yield "".join(lines)


def _json_documents(path: Path, options: DataSource) -> Iterator[str]:
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            try:
                record = json.loads(line)
            except ValueError:
                raise InputError(f"{path}:{number}: not valid JSON") from None
            yield _field(record, options.text_field, f"{path}:{number}")


def _parquet_documents(path: Path, options: DataSource) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: not a parquet file: {str(error).splitlines()[0]}") from None
    with file:
        if options.text_field not in file.schema_arrow.names:
            raise InputError(
                f"{path}: no column {options.text_field!r}; columns are {', '.join(file.schema_arrow.names)}"
            )
        for batch in file.iter_batches(batch_size=256, columns=[options.text_field]):
            for text in batch.column(0).to_pylist():
                yield _field({options.text_field: text}, options.text_field, str(path))


def _field(record: Any, field: str, where: str) -> str:
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise InputError(f"{where}: no text in field {field!r} (has: {keys}); set data.text_field")
    return text


class HubSource:
    """A data set by its `datasets` name, or a local folder in that layout. Code in a data set is never run."""

    def __init__(self, options: DataSource) -> None:
        from datasets import load_dataset

        self.options = options
        self.name = resolve(options.source[0])
        try:
            with hub.quiet():
                loaded = load_dataset(
                    self.name,
                    options.config_name,
                    split=options.split,
                    revision=options.revision,
                    streaming=options.streaming,
                )
        except Exception as error:  # `datasets` raises its own, the Hub client's and plain ones for a wrong name
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"data.source {self.name}: cannot be loaded with `datasets`: {reason}") from error
        self.dataset = loaded if options.streaming else loaded.to_iterable_dataset()

    def open(self, order: np.random.Generator | None, cursor: Cursor | None) -> "HubReader":
        # A buffer of one: only the order of the shards is drawn here. Documents are permuted by whoever reads us,
        # because a buffer inside `datasets` is lost on resume.
        seed = None if order is None else int(order.integers(2**31))
        dataset = self.dataset if seed is None else self.dataset.shuffle(seed=seed, buffer_size=1)
        return HubReader(dataset, self.options.text_field, self.name, cursor)


class HubReader:
    """One pass over a streamed data set. The cursor is the data set's own state."""

    def __init__(self, dataset: Any, field: str, name: str, cursor: Cursor | None) -> None:
        # A deep copy: a data set keeps its place, and the next epoch would begin where this pass was resumed.
        self._dataset = copy.deepcopy(dataset)
        self._field = field
        self._name = name
        self._start = cursor
        self._begun = False
        if cursor is not None:
            self._dataset.load_state_dict(cursor)
        self._records = iter(self._dataset)

    def cursor(self) -> Cursor:
        return self._dataset.state_dict() if self._begun else self._start

    def __next__(self) -> str:
        self._begun = True
        return _field(next(self._records), self._field, self._name)
