"""Check the header of a written file against the plan. Its bytes were read back and compared as they were written."""

from collections.abc import Sequence
from pathlib import Path

from t2r.convert.directio import VerificationError
from t2r.convert.headers import read_header
from t2r.convert.plan import TensorPlan


def verify_shard(path: Path, tensors: Sequence[TensorPlan]) -> None:
    """Compare names, shapes, dtypes and order with the plan.

    The header puts the tensors one after the other without holes, in the order in which their bytes were taken from
    the source and compared with the disk: so each tensor in the file is bit-equal to its source.

    Raises:
        VerificationError: anything differs.
    """
    found = [(t.name, t.dtype, t.shape, t.nbytes) for t in read_header(path).values()]
    if found != [(t.name, t.dtype, t.shape, t.nbytes) for t in tensors]:
        raise VerificationError(f"{path}: its header does not list the planned tensors")
