"""Triton's interpreter, where the kernels run on CPU tensors, unless TRITON_INTERPRET=0 asks for a real device.

The interpreter keeps bf16 as integers and multiplies those: `multiply_bf16_exactly` computes such products in f32,
where they are exact.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter

INTERPRETED: bool = triton.knobs.runtime.interpret
DEVICE = "cpu" if INTERPRETED else "cuda"
"""Where the tensors of tests of kernels live."""


@functools.cache
def multiply_bf16_exactly() -> None:
    """Replaces the interpreter's product of bf16 tiles, for the life of the process."""
    create_dot = interpreter.InterpreterBuilder.create_dot

    def patched(builder: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar):
            return create_dot(builder, a, b, d, *rest)
        product = (_as_f32(a) @ _as_f32(b)).astype(d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = patched


def _as_f32(handle: Any) -> np.ndarray:
    if handle.dtype.scalar == tl.bfloat16:
        bits: np.ndarray = handle.data.astype(np.uint32) << 16
        return bits.view(np.float32)
    values: np.ndarray = handle.data.astype(np.float32)
    return values
