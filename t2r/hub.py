"""The Hugging Face Hub: which text names a repository, and its files downloaded without pickles and code."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    SafetensorsParsingError,
)
from huggingface_hub.utils import logging

from t2r.errors import InputError

# Folders, and the same weights once more in one file of the original authors' format.
_LEFT_OUT = ["*/*", "consolidated*"]
_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")


def is_hub_id(source: str | Path) -> bool:
    """True for text of the form org/name that could name a Hub repository.

    Where a folder `org` lies here, org/name is a path: a mistyped one must not be looked for on the Hub.
    """
    return bool(_HUB_ID.fullmatch(str(source))) and not Path(source).parent.is_dir()


def download(source: str, patterns: Sequence[str]) -> Path:
    """The folder of a repository's snapshot with the files that match `patterns`, none from its folders.

    Raises:
        InputError: no such repository, no access to it, or no connection and nothing in the cache.
    """
    with told_in_one_line(source):
        return Path(snapshot_download(source, allow_patterns=list(patterns), ignore_patterns=_LEFT_OUT)).resolve()


@contextmanager
def told_in_one_line(source: str) -> Iterator[None]:
    """Within the block, what the Hub's client raises becomes an InputError about `source`."""
    try:
        with quiet():
            yield
    except LocalEntryNotFoundError as error:
        raise InputError(f"{source}: no such folder here, and the Hub cannot be reached") from error
    except (HfHubHTTPError, HFValidationError, NotASafetensorsRepoError, SafetensorsParsingError) as error:
        raise InputError(f"{source}: no such folder here; the Hub says: {' '.join(str(error).split())}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Within the block, the Hub's client does not tell of every attempt to connect."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
