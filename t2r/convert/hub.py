"""A checkpoint on the Hugging Face Hub: downloaded without pickles and code, or looked at by its headers alone."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import get_safetensors_metadata, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    SafetensorsParsingError,
)
from huggingface_hub.utils import logging

from t2r.convert.headers import StoredTensor
from t2r.errors import InputError

_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")


def is_hub_id(source: str | Path) -> bool:
    """True for text of the form org/name that could name a Hub repository.

    Where a folder `org` lies here, org/name is a path: a mistyped one must not be looked for on the Hub.
    """
    return bool(_HUB_ID.fullmatch(str(source))) and not Path(source).parent.is_dir()


def download(source: str, patterns: list[str]) -> Path:
    """The folder of a repository's snapshot with the files that match `patterns`, none from its folders.

    Raises:
        InputError: no such repository, no access to it, or no connection and nothing in the cache.
    """
    with _one_line(source):
        return Path(snapshot_download(source, allow_patterns=patterns, ignore_patterns=["*/*"])).resolve()


def remote_tensors(source: str, folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a repository by name, from the headers of its files (a few kilobytes each).

    Their files are named as if they lay in `folder`, the snapshot that holds the rest; offsets count from the end of
    the header.
    """
    with _one_line(source):
        files = get_safetensors_metadata(source, revision=folder.name).files_metadata
    return {
        name: StoredTensor(name, folder / file, info.dtype, tuple(info.shape), begin, end - begin)
        for file, metadata in files.items()
        for name, info in metadata.tensors.items()
        for begin, end in [info.data_offsets]
    }


@contextmanager
def _one_line(source: str) -> Iterator[None]:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would tell of every attempt to connect
    try:
        yield
    except LocalEntryNotFoundError as error:
        raise InputError(f"{source}: no such folder here, and the Hub cannot be reached") from error
    except (HfHubHTTPError, HFValidationError, NotASafetensorsRepoError, SafetensorsParsingError) as error:
        raise InputError(f"{source}: no such folder here; the Hub says: {' '.join(str(error).split())}") from error
    finally:
        logging.set_verbosity(verbosity)
