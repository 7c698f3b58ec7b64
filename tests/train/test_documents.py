"""Documents from every kind of source, and readers that go on where a cursor says."""

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from t2r.errors import InputError
from t2r.recipe.schema import DataSource
from t2r.train.documents import open_source, read_documents

TEXTS = [f"text number {i}\nwith two lines ä" for i in range(10)]


def source(path: Path | str | list[str], **options: Any) -> DataSource:
    return DataSource.model_validate({"source": [str(path)] if not isinstance(path, list) else path, **options})


def write(folder: Path, name: str) -> Path:
    path = folder / name
    records = "".join(json.dumps({"body": text, "other": 1}) + "\n" for text in TEXTS)
    content = (records if ".jsonl" in name else "\n\0\n".join(TEXTS)).encode()
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.table({"body": TEXTS}), path)
    elif name.endswith(".zst"):
        with pyarrow.output_stream(str(path), compression="zstd") as file:
            file.write(content)
    else:
        packed = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}.get(path.suffix, bytes)
        path.write_bytes(packed(content))
    return path


@pytest.mark.parametrize(
    "name", ["a.txt", "a.txt.xz", "a.txt.zst", "a.jsonl", "a.jsonl.gz", "a.jsonl.bz2", "a.jsonl.zst", "a.parquet"]
)
def test_every_format_gives_the_documents(tmp_path: Path, name: str) -> None:
    assert read_documents(source(write(tmp_path, name), text_field="body")) == TEXTS


def test_folders_and_globs_are_read_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.txt", "sub/c.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path, name)
    (tmp_path / "README.md").write_text("not data")
    assert read_documents(source(tmp_path, text_field="body")) == TEXTS * 3
    assert read_documents(source(f"{tmp_path}/*.jsonl", text_field="body")) == TEXTS


def test_whole_files_as_documents_and_empty_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\0\n\n\0\n \n\0\ntwo\n\0\n")
    assert read_documents(source(tmp_path / "a.txt")) == ["one", "two"]
    assert len(read_documents(source(tmp_path / "a.txt", document_separator="none"))) == 1


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl.gz", "a.parquet"])
def test_a_cursor_resumes_at_the_next_document(tmp_path: Path, name: str) -> None:
    options = source(write(tmp_path, name), text_field="body")
    for taken in (0, 3, 9, 10):
        reader = open_source(options).open(None, None)
        before = [next(reader) for _ in range(taken)]
        resumed = open_source(options).open(None, json.loads(json.dumps(reader.cursor())))
        assert before + list(iter(lambda reader=resumed: next(reader, None), None)) == TEXTS


def test_a_local_datasets_folder_streams_and_resumes(tmp_path: Path) -> None:
    write(tmp_path, "train.parquet")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: train.parquet\n---\n"
    )
    options = source(tmp_path, config_name="default", text_field="body")
    origin = open_source(options)
    reader = origin.open(None, None)
    before = [next(reader) for _ in range(4)]
    cursor = json.loads(json.dumps(reader.cursor()))
    resumed = origin.open(None, cursor)
    assert resumed.cursor() == cursor
    assert before + list(iter(lambda: next(resumed, None), None)) == TEXTS
    again = origin.open(None, None)  # the next epoch starts at the start, not where the run was resumed
    assert next(again) == TEXTS[0]


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b'{"body": 1}\n', "a.jsonl", r"a\.jsonl:1: no text in field 'body' \(has: body\)"),
        (b'{"body": "x"}\n{"bod', "a.jsonl", r"a\.jsonl:2: not valid JSON"),
        (b"not parquet", "a.parquet", "not a parquet file"),
        (b"\xff\xfe", "a.txt", "not UTF-8"),
        (b"not gzip", "a.txt.gz", "cannot be read"),
        (b"x", "a.csv", "not data that can be read"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, content: bytes, name: str, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_documents(source(tmp_path / name, text_field="body"))


def test_a_missing_column_names_those_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no column 'text'; columns are body"):
        read_documents(source(write(tmp_path, "a.parquet")))


def test_missing_sources(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        open_source(source(tmp_path / "absent.txt"))
    with pytest.raises(InputError, match="holds no"):
        open_source(source(tmp_path))
    with pytest.raises(InputError, match="cannot be loaded with `datasets`"):
        open_source(source("no-such-owner/no-such-set"))
    with pytest.raises(InputError, match="stands alone"):
        open_source(source(["no-such-owner/no-such-set", "another/one"]))
