"""Data types of weights as numpy stores them. It has no bfloat16: the 16 bits are kept as uint16. Pure arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np

from muxmesh.errors import ModelUnsupported
from muxmesh.types import Dtype

STORED_AS: dict[Dtype, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
}
_MAX_FLOAT16 = 65504
_NAN_BIT = np.uint16(0x40)
_BFLOAT16_EXPONENT = np.uint16(0x7F80)


def in_dtype(values: np.ndarray, dtype: Dtype, weight: str) -> np.ndarray:
    """Returns the f32 ``values`` in ``dtype``, rounded to the nearest, ties to even.

    Exact for values that came from ``dtype``. Raises ModelUnsupported, which names ``weight``, if a finite value is
    beyond float16.
    """
    if dtype == "bfloat16":
        return to_bfloat16(values)
    if dtype == "float16":
        with np.errstate(over="ignore"):
            converted = values.astype(STORED_AS[dtype])
        beyond = np.isinf(converted) & np.isfinite(values)
        if beyond.any():
            raise ModelUnsupported(
                f"weight {weight} contains {float(values[beyond][0]):g}; float16 ends at {_MAX_FLOAT16}. Use dtype: "
                "bfloat16 or float32"
            )
        return converted
    return values.astype(STORED_AS[dtype], copy=False)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Returns f32 ``values`` as the bits of bfloat16 (uint16), rounded to the nearest, ties to even. NaN stays NaN.

    As in IEEE 754, values of at least 2**128 - 2**119 become infinity.
    """
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    result: np.ndarray = rounded.astype(np.uint16)
    nans = np.isnan(values)
    if nans.any():
        result[nans] = (bits[nans] >> 16).astype(np.uint16) | _NAN_BIT
    return result


def is_finite(stored: np.ndarray, dtype: Dtype) -> bool:
    """True if no value is NaN or infinity. ``stored``: as in `STORED_AS`."""
    if dtype == "bfloat16":
        return not ((stored & _BFLOAT16_EXPONENT) == _BFLOAT16_EXPONENT).any()
    return bool(np.isfinite(stored).all())


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """Returns the bits of bfloat16 as f32: a bfloat16 is the upper half of an f32."""
    values: np.ndarray = (bits.astype(np.uint32) << 16).view(np.float32)
    return values
