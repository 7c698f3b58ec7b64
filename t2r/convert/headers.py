"""Read and write the header of a safetensors file: names, dtypes, shapes and byte ranges, without the weights.

Format (https://huggingface.co/docs/safetensors): 8 bytes little-endian header length, JSON header, tensor bytes. The
ranges must cover the rest of the file without holes or overlaps; a file that breaks a rule is refused, never repaired.
"""

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2r.errors import InputError

BYTES_PER_ELEMENT = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file. `offset` counts bytes from the start of the file."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name, in the order of their bytes, from the header alone.

    Raises:
        InputError: not a safetensors file, or one that is truncated, padded, overlapping, with holes, with duplicate
            names, or whose dtypes, shapes and byte counts disagree.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(len(_LFS_POINTER))
        if start == _LFS_POINTER:
            raise InputError(f"{path}: a Git LFS pointer, not the weights; run `git lfs pull` in the repository")
        if size < 8:
            raise InputError(f"{path}: {size} bytes, too short for a safetensors file (empty or truncated)")
        (length,) = struct.unpack("<Q", start[:8])
        if length > _MAX_HEADER_BYTES:
            raise InputError(
                f"{path}: header length {length}, above the limit of {_MAX_HEADER_BYTES} bytes: not a safetensors file"
            )
        if 8 + length > size:
            raise InputError(f"{path}: truncated: the header ends at byte {8 + length}, the file has {size}")
        file.seek(8)
        header = parse_json(file.read(length), path)
    header.pop("__metadata__", None)
    data = 8 + length
    tensors = sorted(
        (_entry(path, name, entry, data) for name, entry in header.items()), key=lambda t: (t.offset, t.nbytes)
    )
    end = data
    for tensor in tensors:
        if tensor.offset != end:
            fault = "overlaps the one before it" if tensor.offset < end else "leaves a hole before it"
            raise InputError(f"{path}: tensor {tensor.name} starts at byte {tensor.offset}, expected {end}: it {fault}")
        end += tensor.nbytes
    if end != size:
        fault = "truncated" if size < end else "padded"
        raise InputError(f"{path}: {fault}: its tensors end at byte {end}, the file has {size}")
    return {tensor.name: tensor for tensor in tensors}


def build_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """Length prefix and JSON header for (name, dtype, shape) in the order in which their bytes will follow.

    Padded with spaces to a multiple of 8, so that data stays aligned when wider dtypes come first.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without it
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + math.prod(shape) * BYTES_PER_ELEMENT[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def parse_json(text: bytes, path: Path) -> dict[str, Any]:
    """A JSON object without duplicate keys, or InputError that names `path`."""

    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise InputError(f"{path}: key {key!r} appears twice")
            found[key] = value
        return found

    try:
        parsed = json.loads(text, object_pairs_hook=refuse_duplicates)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({str(error) or type(error).__name__})") from error
    if not isinstance(parsed, dict):
        raise InputError(f"{path}: holds a JSON {type(parsed).__name__}, expected an object")
    return parsed


def _entry(path: Path, name: str, entry: object, data: int) -> StoredTensor:
    if not isinstance(entry, Mapping) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise InputError(f"{path}: tensor {name} has no dtype, shape and data_offsets in the header")
    if not name.isprintable():
        raise InputError(f"{path}: tensor name {name!r} holds characters that cannot be printed")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BYTES_PER_ELEMENT:
        raise InputError(f"{path}: tensor {name} has dtype {dtype!r}, known are {', '.join(BYTES_PER_ELEMENT)}")
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise InputError(f"{path}: tensor {name} has shape {shape!r} and data_offsets {offsets!r}: not counts")
    begin, end = offsets
    if end - begin != math.prod(shape) * BYTES_PER_ELEMENT[dtype]:
        raise InputError(
            f"{path}: tensor {name} has {end - begin} bytes, shape {list(shape)} of {dtype} needs "
            f"{math.prod(shape) * BYTES_PER_ELEMENT[dtype]}"
        )
    return StoredTensor(name, path, dtype, tuple(shape), data + begin, end - begin)


def _are_counts(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
