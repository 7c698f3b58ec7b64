"""A checkpoint on disk: which files it has and which tensor lies where. Trusts nothing, reads no weights."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import get_safetensors_metadata

from t2r.convert.headers import StoredTensor, parse_json, read_header
from t2r.errors import InputError
from t2r.hub import download, is_hub_id, told_in_one_line
from t2r.model.loading import INDEX, check_file_name

SINGLE = "model.safetensors"
# Copied byte for byte: what turns text into ids and back, how to sample, and the terms of use.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tekken.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md")
_HUB_PATTERNS = (INDEX, "config.json", "README.md", *TOKENIZER_FILES, *LICENCE_FILES)
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_MAX_JSON_BYTES = 64 << 20
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class Checkpoint:
    """A safetensors checkpoint. `name` is what the user called it, `folder` where it lies, resolved."""

    name: str
    folder: Path
    tensors: dict[str, StoredTensor]

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json as it stands; t2r.convert.hosts decides what of it is used."""
        return read_json(self.folder, "config.json")

    @property
    def layers(self) -> int:
        """How many layers the weights have."""
        return len({match[1] for name in self.tensors if (match := _LAYER.match(name))})

    @property
    def revision(self) -> str | None:
        """The commit, for a snapshot in a Hub cache."""
        return self.folder.name if self.folder.parent.name == "snapshots" else None

    def copied_files(self) -> list[Path]:
        """The tokenizer, generation and licence files that a student takes over byte for byte."""
        return [path for name in (*TOKENIZER_FILES, *LICENCE_FILES) if (path := member(self.folder, name)).is_file()]


def open_checkpoint(source: str | Path, *, weights: bool = True) -> Checkpoint:
    """Find every tensor of a checkpoint from its index and headers.

    Args:
        source: a local folder, or a Hub id, which is downloaded into the Hub cache.
        weights: False leaves the weights of a Hub id where they are and asks for their headers alone.

    Raises:
        InputError: anything that does not add up: no weights, pickles only, shards absent or unlisted, a tensor in
            two shards or not in the shard the index names, paths that leave the folder, broken headers.
    """
    remote = not Path(source).exists()
    if remote and not is_hub_id(source):
        raise InputError(f"{source}: no such folder, and not a Hub id (org/name)")
    if remote:
        folder = download(str(source), [*_HUB_PATTERNS, "model*.safetensors"] if weights else _HUB_PATTERNS)
    elif Path(source).is_dir():
        folder = Path(source).resolve()
    else:
        raise InputError(f"{source}: a file, expected the folder of a checkpoint")
    if not any(folder.iterdir()):
        raise InputError(f"{source}: the folder is empty")
    if not (folder / "config.json").is_file():
        raise InputError(f"{source}: no config.json in the folder, so it is no checkpoint")
    tensors = _remote_tensors(str(source), folder) if remote and not weights else _local_tensors(source, folder)
    return Checkpoint(str(source), folder, tensors)


def _remote_tensors(source: str, folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a repository by name, from the headers of its files (a few kilobytes each).

    Their files are named as if they lay in `folder`, the snapshot that holds the rest; offsets count from the end of
    the header.
    """
    with told_in_one_line(source):
        files = get_safetensors_metadata(source, revision=folder.name).files_metadata
    return {
        name: StoredTensor(name, folder / file, info.dtype, tuple(info.shape), begin, end - begin)
        for file, metadata in files.items()
        for name, info in metadata.tensors.items()
        for begin, end in [info.data_offsets]
    }


def _local_tensors(source: str | Path, folder: Path) -> dict[str, StoredTensor]:
    present = {path.name for path in folder.glob("*.safetensors")}
    if os.path.lexists(folder / INDEX):
        return _sharded(folder, present)
    if SINGLE not in present:
        raise InputError(_no_weights(source, folder, present))
    extra = sorted(present - {SINGLE})
    if extra:
        raise InputError(f"{folder / extra[0]}: present beside {SINGLE}, but there is no {INDEX} that lists it")
    return read_header(member(folder, SINGLE))


def member(folder: Path, name: str) -> Path:
    """`folder`/`name`, refused when it is no plain file name or a link that leads out of the folder.

    A Hub cache keeps its files in <repository>/blobs and links to them from <repository>/snapshots/<commit>: those
    links are fine.
    """
    path = folder / name
    check_file_name(folder, name)
    allowed = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        allowed.append(folder.resolve().parent.parent / "blobs")
    if path.is_symlink() and not any(path.resolve().is_relative_to(place) for place in allowed):
        raise InputError(f"{path}: a link that leaves the folder, to {path.resolve()}")
    return path


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of the checkpoint, without duplicate keys."""
    path = member(folder, name)
    if not path.is_file():
        raise InputError(f"{path}: missing")
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise InputError(f"{path}: {path.stat().st_size} bytes, above the limit of {_MAX_JSON_BYTES}")
    return parse_json(path.read_bytes(), path)


def _sharded(folder: Path, present: set[str]) -> dict[str, StoredTensor]:
    index = folder / INDEX
    listed = read_json(folder, INDEX).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
        raise InputError(f"{index}: no weight_map of tensor names to file names")
    files = {name: member(folder, name) for name in sorted(set(listed.values()))}
    for name, path in files.items():
        if not path.is_file():
            raise InputError(f"{path}: listed in {INDEX}, but absent")
        if not name.endswith(".safetensors"):
            raise InputError(f"{path}: listed in {INDEX}, but no safetensors file")
    # Some repositories carry the same weights once more in one file of the original authors' format.
    unlisted = sorted(name for name in present - files.keys() if not name.startswith("consolidated"))
    if unlisted:
        raise InputError(f"{folder / unlisted[0]}: present, but not listed in {INDEX}")
    tensors: dict[str, StoredTensor] = {}
    for name, path in files.items():
        for tensor in read_header(path).values():
            if tensor.name in tensors:
                other = tensors[tensor.name].file.name
                raise InputError(f"{folder}: tensor {tensor.name} is in two shards, {other} and {name}")
            if listed.get(tensor.name) != name:
                where = listed.get(tensor.name, "nowhere")
                raise InputError(f"{path}: holds tensor {tensor.name}, which {INDEX} puts in {where}")
            tensors[tensor.name] = tensor
    missing = _first(name for name in listed if name not in tensors)
    if missing:
        raise InputError(f"{folder / listed[missing]}: does not hold tensor {missing}, which {INDEX} puts there")
    return tensors


def _no_weights(source: str | Path, folder: Path, present: set[str]) -> str:
    if present:
        return f"{folder / sorted(present)[0]}: present, but there is neither {SINGLE} nor {INDEX}"
    pickle = _first(sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern)))
    if pickle:
        return f"{folder / pickle}: a pickle, which can run code; only safetensors checkpoints are read"
    return f"{source}: no weights in the folder (neither {SINGLE} nor {INDEX})"


def _first(names: Iterable[str]) -> str | None:
    return next(iter(names), None)
