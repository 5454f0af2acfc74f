from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from muxmesh.errors import ModelUnsupported
from muxmesh.models.stored_dtypes import from_bfloat16, in_dtype, is_finite, to_bfloat16
from muxmesh.types import Dtype

TIES = np.array([1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8)], dtype=np.float32)
SPECIAL = np.array([0.0, -0.0, np.inf, -np.inf, 1e-45, 3.4e38, -3.4e38], dtype=np.float32)


def torch_bits(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    bits: np.ndarray = torch.from_numpy(values).to(dtype).view(torch.int16).numpy().view(np.uint16)
    return bits


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64))
def test_bfloat16_is_rounded_as_torch_rounds_it(patterns: list[int]) -> None:
    values = np.array(patterns, dtype=np.uint32).view(np.float32)
    values = values[~np.isnan(values)]
    assert np.array_equal(to_bfloat16(values), torch_bits(values, torch.bfloat16))


@pytest.mark.parametrize("values", [TIES, SPECIAL])
def test_ties_go_to_even_and_infinity_and_zero_stay(values: np.ndarray) -> None:
    assert np.array_equal(to_bfloat16(values), torch_bits(values, torch.bfloat16))


@given(st.integers(1, 2**23 - 1), st.booleans())
def test_nan_stays_nan_whatever_its_payload(payload: int, negative: bool) -> None:
    values = np.array([0x7F800000 | payload | negative << 31], dtype=np.uint32).view(np.float32)
    assert np.isnan(from_bfloat16(to_bfloat16(values))).all()


def test_every_bfloat16_survives_the_way_over_f32() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    numbers = bits[~np.isnan(from_bfloat16(bits))]
    assert np.array_equal(to_bfloat16(from_bfloat16(numbers)), numbers)


@pytest.mark.parametrize("dtype", get_args(Dtype))
def test_nan_and_infinity_are_not_finite_in_any_dtype(dtype: Dtype) -> None:
    values = np.array([0.0, -1.5, 6e4, -6e-8], dtype=np.float32)
    assert is_finite(in_dtype(values, dtype, "w"), dtype)
    for odd in (np.nan, np.inf, -np.inf):
        assert not is_finite(in_dtype(np.append(values, np.float32(odd)), dtype, "w"), dtype)


@pytest.mark.parametrize(("value", "fits"), [(65519.0, True), (65520.0, False), (-7e4, False), (np.inf, True)])
def test_a_finite_value_that_would_become_infinite_in_float16_is_refused(value: float, fits: bool) -> None:
    values = np.array([1.0, value], dtype=np.float32)
    if fits:
        assert np.array_equal(in_dtype(values, "float16", "w").view(np.uint16), torch_bits(values, torch.float16))
    else:
        with pytest.raises(ModelUnsupported, match=r"weight w contains .*; float16 ends at 65504"):
            in_dtype(values, "float16", "w")
