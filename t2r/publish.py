"""Publish a folder all at once: write it beside, hash it, sync it, rename it.

A reader sees the whole folder or none. A kill leaves at most a ``.NAME.partial-*`` folder, which the next ``publish``
of the same destination removes. Nothing that a kill leaves loads: config.json, without which transformers loads no
folder, gets its name after everything else is in place.
"""

import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
        InputError: `destination` exists and `overwrite` is False.
    """
    destination = Path(destination)
    if (destination / PENDING_CONFIG).is_file():
        shutil.rmtree(destination)  # a kill came between the last two renames
    _restore(destination)
    if destination.exists() and not overwrite:
        raise InputError(f"{destination}: already exists; pass --overwrite to replace it, or name another folder")
    parent = destination.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    remove_partials(destination)
    staging = Path(tempfile.mkdtemp(prefix=f".{destination.name}.partial-", dir=parent))
    try:
        staging.chmod(0o755)
        yield staging
        if (staging / CONFIG).is_file():
            os.rename(staging / CONFIG, staging / PENDING_CONFIG)
        write_manifest(staging, hashes or {})
        for path in _files(staging):
            _sync(path)
        for folder in [p for p in staging.rglob("*") if p.is_dir()] + [staging]:
            _sync(folder)
        _swap(staging, destination)
        if (destination / PENDING_CONFIG).is_file():
            os.rename(destination / PENDING_CONFIG, destination / CONFIG)
            _sync(destination)
        _sync(parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _restore(destination: Path) -> None:
    """Put back a destination that a kill left moved aside, its successor not yet in its place."""
    if not destination.exists():
        for old in _partials(destination):
            if (old / _OLD).is_dir():
                os.rename(old / _OLD, destination)
                return


def _partials(destination: Path) -> list[Path]:
    return list(destination.absolute().parent.glob(f".{glob.escape(destination.name)}.partial-*"))


def remove_partials(destination: Path) -> None:
    """Remove what a killed publish of `destination` left beside it."""
    for path in _partials(Path(destination)):
        shutil.rmtree(path, ignore_errors=True)


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
    """Write one file that a reader sees whole or, after a kill, as it was."""
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


def _swap(staging: Path, destination: Path) -> None:
    """Rename `staging` to `destination`; an old destination is moved aside first, so a kill never mixes the two."""
    if not destination.exists():
        os.rename(staging, destination)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{destination.name}.partial-", dir=staging.parent)) / _OLD
    os.rename(destination, old)
    os.rename(staging, destination)
    shutil.rmtree(old.parent, ignore_errors=True)
