"""Write the tensors of a plan, block by block: memory does not depend on the size of the model or of a tensor.

What is written is hashed on its way in a second thread, so that verification needs no second look at the source.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor

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
    """Write one safetensors file and return the SHA-256 of the bytes it should hold.

    Args:
        path: the file to create; it must not exist.
        tensors: in the order in which their bytes lie in the file.
        new: initial values of the tensors whose action is "new".
        allow_nonfinite: write NaN and Inf as they come instead of refusing them.
        advance: called with the number of tensor bytes just written.

    Raises:
        InputError: a tensor holds NaN or Inf, or values outside the range of the target dtype.
    """
    with _HashingFile(path) as file:
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
        return file.hexdigest()


def read_blocks(tensor: StoredTensor) -> Iterator[Tensor]:
    """The elements of a stored floating-point tensor as flat blocks.

    Two buffers alternate: a block is overwritten when the next but one is asked for.
    """
    dtype = TORCH_DTYPES[tensor.dtype]
    size = min(_BLOCK_BYTES, tensor.nbytes)
    buffers = (bytearray(size), bytearray(size))
    with open(tensor.file, "rb", buffering=0) as file:
        for number, start in enumerate(range(0, tensor.nbytes, size or 1)):
            view = memoryview(buffers[number % 2])[: min(size, tensor.nbytes - start)]
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


class _HashingFile:
    """A file whose bytes are hashed by a second thread while the first reads and writes the next ones."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "xb")  # noqa: SIM115  (closed in __exit__)
        self._digest = hashlib.sha256()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="sha256")
        self._hashed: Future[None] | None = None

    def write(self, data: memoryview) -> None:
        """Append `data`, which must stay as it is until the call after this one returns."""
        if self._hashed is not None:
            self._hashed.result()
        self._hashed = self._pool.submit(self._digest.update, data)
        self._file.write(data)

    def hexdigest(self) -> str:
        if self._hashed is not None:
            self._hashed.result()
        return self._digest.hexdigest()

    def __enter__(self) -> "_HashingFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()
        self._file.close()
