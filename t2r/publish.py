"""Publish a folder all at once: write it beside, hash it, sync it, rename it.

A reader sees the whole folder or none. A kill leaves at most a ``.NAME.partial-*`` folder, which the next ``publish``
of the same destination removes. Nothing that a kill leaves loads: config.json, without which transformers loads no
folder, gets its name after everything else is in place. Of two that publish one destination at once, each writes
beside the other, and the last rename wins where `overwrite` allows it.
"""

import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from t2r.errors import InputError

MANIFEST = "manifest.json"
CONFIG = "config.json"
PENDING_CONFIG = ".config.json.pending"
_BLOCK = 1 << 22
_OLD = "old"


@contextmanager
def publish(destination: Path, *, overwrite: bool = False, hashes: Mapping[str, str] | None = None) -> Iterator[Path]:
    """Yield a staging folder that becomes `destination` when the block ends without an exception.

    A block that takes long after it wrote config.json writes it as PENDING_CONFIG instead; it is renamed at the end.

    Args:
        destination: the folder to publish. Its parent is made when missing.
        overwrite: replace an existing folder; without it one raises InputError before anything is written.
        hashes: SHA-256 by relative path of files the caller hashed while writing them; filled by reference, so a
            caller may pass an empty dict and add to it inside the block. The rest are hashed here.

    Raises:
        InputError: `destination` exists, or has come to exist by the end of the block, and `overwrite` is False.
    """
    destination = Path(destination)
    if (destination / PENDING_CONFIG).is_file() and _abandoned(destination):
        shutil.rmtree(destination)  # a kill came between the last two renames
    _restore(destination)
    if destination.exists() and not overwrite:
        raise InputError(f"{destination}: already exists; pass --overwrite to replace it, or name another folder")
    parent = destination.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    for path in _leftovers(destination):
        shutil.rmtree(path, ignore_errors=True)
    with _partial(destination) as staging:
        staging.chmod(0o755)
        yield staging
        if (staging / CONFIG).is_file():
            os.rename(staging / CONFIG, staging / PENDING_CONFIG)
        write_manifest(staging, hashes or {})
        for path in _files(staging):
            _sync(path)
        for folder in [p for p in staging.rglob("*") if p.is_dir()] + [staging]:
            _sync(folder)
        _swap(staging, destination, overwrite)
        if (destination / PENDING_CONFIG).is_file():
            os.rename(destination / PENDING_CONFIG, destination / CONFIG)
            _sync(destination)
        _sync(parent)


@contextmanager
def _partial(destination: Path) -> Iterator[Path]:
    """A new folder beside `destination`, ours by a lock that ends with the block or with this process. What the block
    has not renamed is removed."""
    path = Path(tempfile.mkdtemp(prefix=f".{destination.name}.partial-", dir=destination.absolute().parent))
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield path
    finally:
        os.close(descriptor)
        shutil.rmtree(path, ignore_errors=True)


def _abandoned(folder: Path) -> bool:
    """Whether the process that made `folder` is gone. Where the file system has no locks, it is taken to be."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # gone itself, or not ours to look at
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return True


def _leftovers(destination: Path) -> list[Path]:
    """What killed publishes of `destination` left beside it."""
    found = destination.absolute().parent.glob(f".{glob.escape(destination.name)}.partial-*")
    return [path for path in found if _abandoned(path)]


def _restore(destination: Path) -> None:
    """Put back a destination that a kill left moved aside, its successor not yet in its place."""
    if not destination.exists():
        for old in _leftovers(destination):
            if (old / _OLD).is_dir():
                os.rename(old / _OLD, destination)
                return


def write_manifest(folder: Path, hashes: Mapping[str, str] | None = None) -> None:
    """Write manifest.json: {"files": {relative path: {"bytes": int, "sha256": hex}}}, sorted by path."""
    known = hashes or {}
    entries = {}
    for path in _files(folder):
        name = path.relative_to(folder).as_posix()
        if name == PENDING_CONFIG:
            name = CONFIG
        if name != MANIFEST:
            entries[name] = {"bytes": path.stat().st_size, "sha256": known.get(name) or sha256_file(path)}
    (folder / MANIFEST).write_text(json.dumps({"files": entries}, indent=1, sort_keys=True) + "\n")


def verify_manifest(folder: Path, *, contents: bool = True) -> list[str]:
    """Problems of a published folder, a line each; empty when it verifies.

    Args:
        contents: also compare SHA-256 sums; without it only presence and sizes are checked.
    """
    folder = Path(folder)
    try:
        entries = json.loads((folder / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{folder / MANIFEST}: cannot be read ({type(error).__name__})"]
    problems = []
    for name, entry in entries.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            problems.append(f"{path}: leaves the folder")
        elif not path.is_file():
            problems.append(f"{path}: missing")
        elif path.stat().st_size != entry["bytes"]:
            problems.append(f"{path}: {path.stat().st_size} bytes, manifest says {entry['bytes']}")
        elif contents and sha256_file(path) != entry["sha256"]:
            problems.append(f"{path}: SHA-256 differs from the manifest")
    return problems


def write_whole(path: Path, text: str) -> None:
    """Write one file that a reader sees whole or, after a kill, as it was. Its folder is made when missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, hex, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap(staging: Path, destination: Path, overwrite: bool) -> None:
    """Rename `staging` to `destination`; an old destination is moved aside first, so a kill never mixes the two."""
    if overwrite and destination.exists():
        with _partial(destination) as aside:
            try:
                os.rename(destination, aside / _OLD)
                os.rename(staging, destination)
            finally:
                if not destination.exists():
                    os.rename(aside / _OLD, destination)
        return
    try:
        os.rename(staging, destination)
    except OSError:
        if not destination.exists():
            raise
        raise InputError(f"{destination}: was made by someone else meanwhile; nothing was replaced") from None
