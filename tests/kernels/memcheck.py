"""What compute-sanitizer's memcheck does on a GPU, in Triton's interpreter: no kernel may touch memory outside the
tensors that it was given.

A pointer carries the number of its argument in its upper 16 bits (an address of a process has zeros there), so that an
access counts as one of the tensor that it was computed from, wherever else it would fall.
"""

import numpy as np
import pytest
import torch

TAG, ADDRESS = np.uint64(48), np.uint64(2**48 - 1)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on a load or store outside its tensor, or not at a multiple of its size, is an InterpreterError."""
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    given: list[tuple[str, int, int]] = []  # tensors that kernels got: what each is, its first byte, one past its last
    convert, load, store = interpreter._implicit_cvt, builder.create_masked_load, builder.create_masked_store

    def tagged(arg):
        converted = convert(arg)
        if isinstance(arg, torch.Tensor):
            assert len(given) < 2**16
            numbers = 1 + sum((n - 1) * s for n, s in zip(arg.shape, arg.stride(), strict=True)) if arg.numel() else 0
            converted.handle.data += np.uint64(len(given) << 48)
            end = arg.data_ptr() + numbers * arg.element_size()
            given.append((f"{arg.dtype} {tuple(arg.shape)}", arg.data_ptr(), end))
        return converted

    def checked(pointers, mask):
        size = pointers.get_element_ty().primitive_bitwidth // 8
        address = pointers.data & ADDRESS
        tensor, first, end = given[int(pointers.data.flat[0] >> TAG)]
        wrong = mask.data & ((address < first) | (address + size > end) | (address % size != 0))
        if wrong.any():
            byte = int(address[wrong][0]) - first
            raise IndexError(f"{wrong.sum()} accesses outside a {tensor}, the first at byte {byte}")
        return interpreter.TensorHandle(address, pointers.dtype)

    monkeypatch.setattr(interpreter, "_implicit_cvt", tagged)
    monkeypatch.setattr(
        builder, "create_masked_load", lambda self, p, mask, *rest: load(self, checked(p, mask), mask, *rest)
    )
    monkeypatch.setattr(
        builder, "create_masked_store", lambda self, p, x, mask, *rest: store(self, checked(p, mask), x, mask, *rest)
    )
