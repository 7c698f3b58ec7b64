"""Write the tensors of a plan, block by block: memory does not depend on the size of the model or of a tensor.

What is written is hashed on its way and compared with what then lies on the disk, so nothing is read twice.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from t2r.convert.directio import VerifiedWriter
from t2r.convert.headers import BYTES_PER_ELEMENT, StoredTensor, build_header
from t2r.convert.plan import TensorPlan
from t2r.errors import InputError

TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BLOCK_BYTES = 2 << 20  # stays in a core's cache between being read, looked at and written


class NewTensors(Protocol):
    """Gives the initial value of a tensor that the source does not have."""

    def value(self, tensor: TensorPlan) -> Tensor: ...


def write_shard(
    path: Path,
    tensors: Sequence[TensorPlan],
    new: NewTensors,
    *,
    allow_nonfinite: bool = False,
    advance: Callable[[int], None] = lambda nbytes: None,
) -> str:
    """Write one safetensors file, read back and compared block by block, and return its SHA-256.

    Args:
        path: the file to create; it must not exist.
        tensors: in the order in which their bytes lie in the file.
        new: initial values of the tensors whose action is "new".
        allow_nonfinite: write NaN and Inf as they come instead of refusing them.
        advance: called with the number of tensor bytes just written.

    Raises:
        InputError: a tensor holds NaN or Inf, or values outside the range of the target dtype.
        VerificationError: the disk does not hold what was written.
    """
    with VerifiedWriter(path) as file:
        file.write(memoryview(build_header((t.name, t.dtype, t.shape) for t in tensors)))
        for tensor in tensors:
            blocks = [new.value(tensor)] if tensor.source is None else read_blocks(tensor.source)
            for block in blocks:
                written = block.to(TORCH_DTYPES[tensor.dtype])
                if not allow_nonfinite and not is_finite(written):
                    raise InputError(_describe_nonfinite(tensor, block))
                data = written.contiguous().view(-1).view(torch.uint8).numpy().data
                file.write(data)
                advance(len(data))
        return file.finish()


def read_blocks(tensor: StoredTensor) -> Iterator[Tensor]:
    """The elements of a stored floating-point tensor as flat blocks. Each overwrites the one before."""
    dtype = TORCH_DTYPES[tensor.dtype]
    size = min(_BLOCK_BYTES, tensor.nbytes)
    buffer = memoryview(bytearray(size))
    with open(tensor.file, "rb", buffering=0) as file:
        for start in range(0, tensor.nbytes, size or 1):
            view = buffer[: min(size, tensor.nbytes - start)]
            done = 0
            while done < len(view):
                count = os.preadv(file.fileno(), [view[done:]], tensor.offset + start + done)
                if count == 0:
                    raise InputError(f"{tensor.file}: became shorter while it was read")
                done += count
            yield torch.frombuffer(view, dtype=dtype, count=len(view) // BYTES_PER_ELEMENT[tensor.dtype])


def is_finite(values: Tensor) -> bool:
    """True when no element is NaN or Inf."""
    # A sum of finite numbers is finite unless it overflows, and the sum runs at the speed of memory: only a suspect
    # block pays for the exact test.
    total = values.sum(dtype=torch.float32 if values.dtype != torch.float64 else None)
    return bool(total.isfinite()) or bool(values.isfinite().all())


def _describe_nonfinite(tensor: TensorPlan, block: Tensor) -> str:
    where = f"{tensor.source.file}: tensor {tensor.source.name}" if tensor.source else f"tensor {tensor.name}"
    if is_finite(block):
        return f"{where} holds values outside the range of {tensor.dtype}; choose another --dtype"
    return f"{where} holds NaN or Inf; pass --allow-nonfinite to convert it all the same"
