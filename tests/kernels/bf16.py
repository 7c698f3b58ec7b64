"""bf16 in Triton's interpreter as on a GPU: rounded to nearest when it is made, exact in products that add up in fp32.

The interpreter keeps bf16 as the 16 bits that it is, cuts instead of rounding, and multiplies those bits as integers in
`tl.dot` and in arithmetic (seen with Triton 3.9).
"""

import numpy as np
import pytest
import torch


def to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bits(x: np.ndarray) -> np.ndarray:
    rounded = torch.from_numpy(np.array(x, dtype=np.float32)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast_others, compute_others, multiply = builder.cast_impl, builder.binary_op, builder.create_dot

    def widened(x):
        return handle(to_float32(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x

    def cast(self, x, to):
        if to.scalar == tl.bfloat16:
            return handle(to_bits(widened(x).data), tl.bfloat16)
        return cast_others(self, widened(x), to)

    def compute(self, x, y, op):
        if x.dtype.scalar == tl.bfloat16:
            return handle(to_bits(op(to_float32(x.data), to_float32(y.data))), tl.bfloat16)
        return compute_others(self, x, y, op)

    monkeypatch.setattr(builder, "cast_impl", cast)
    monkeypatch.setattr(builder, "binary_op", compute)
    monkeypatch.setattr(builder, "create_dot", lambda self, x, y, *rest: multiply(self, widened(x), widened(y), *rest))
