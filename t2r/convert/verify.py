"""Check what was written against what was planned, by reading the file again."""

import os
from collections.abc import Sequence
from pathlib import Path

from t2r.convert.headers import read_header
from t2r.convert.plan import TensorPlan
from t2r.publish import sha256_file


class VerificationError(RuntimeError):
    """A file does not hold what was written into it: a fault of the disk, the memory or of t2r, not of the input."""


def verify_shard(path: Path, tensors: Sequence[TensorPlan], sha256: str) -> None:
    """Read a shard back and compare names, shapes, dtypes, order and every byte; then sync it to the disk.

    `sha256` was computed over the header and over the bytes of every tensor as they came from the source. The header
    of the file puts the same tensors in the same order without holes, so equal sums mean that each tensor in the file
    is bit-equal to its source.

    Raises:
        VerificationError: anything differs.
    """
    found = [(t.name, t.dtype, t.shape, t.nbytes) for t in read_header(path).values()]
    planned = [(t.name, t.dtype, t.shape, t.nbytes) for t in tensors]
    if found != planned:
        raise VerificationError(f"{path}: its header does not list the planned tensors")
    if sha256_file(path) != sha256:
        raise VerificationError(f"{path}: its bytes differ from those that were written into it")
    with open(path, "rb") as file:
        os.fsync(file.fileno())
