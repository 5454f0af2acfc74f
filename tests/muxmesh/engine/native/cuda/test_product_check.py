"""Products are tried on the CPU, right as torch computes them and with tiles left out as a GPU was seen to do."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from muxmesh.engine.native.cuda.product_check import check_products, wrong_products
from muxmesh.errors import DeviceError
from muxmesh.models.device_capacity import MAX_LOGIT_ROWS


def weights(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    sizes = {"norm": (32,), "embed": (96, 32), "0.qkv": (64, 32), "1.qkv": (64, 32), "0.down": (32, 48)}
    chance = torch.Generator().manual_seed(3)
    return {
        name: torch.randn(size, generator=chance).to(dtype) for name, size in (sizes | {"lm_head": (96, 32)}).items()
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_right_products_pass(dtype: torch.dtype) -> None:
    check_products(weights(dtype), max_rows=64, num_sms=132)


@pytest.mark.parametrize("function", ["mm", "addmm_"])
def test_a_tile_that_is_left_out_is_found_and_named(monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    real_mm, real_addmm = torch.mm, Tensor.addmm_

    def mm(x: Tensor, other: Tensor, *, out: Tensor) -> Tensor:
        if function == "mm" and len(x) == 16 and other.shape[1] == 64:
            out[:, :48] = real_mm(x, other)[:, :48]
            return out
        return real_mm(x, other, out=out)

    def addmm_(self: Tensor, x: Tensor, other: Tensor) -> Tensor:
        before = self.clone()
        result: Tensor = real_addmm(self, x, other)
        if function == "addmm_" and len(x) == 16 and other.shape[1] == 64:
            result[:, 48:] = before[:, 48:]
        return result

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(Tensor, "addmm_", addmm_)
    assert list(wrong_products(weights(), 64)) == ["[16, 32] x [32, 64]"]
    expected = r"1 products in bfloat16 are wrong on 52 SMs, such as \[16, 32\] x \[32, 64\]: .* green_contexts"
    with pytest.raises(DeviceError, match=expected):
        check_products(weights(), max_rows=64, num_sms=52)


def tried(monkeypatch: pytest.MonkeyPatch, tensors: Mapping[str, Tensor], max_rows: int) -> set[tuple[int, ...]]:
    """Rows, inputs and outputs of every product that is tried."""
    real_mm, found = torch.mm, set[tuple[int, ...]]()

    def mm(x: Tensor, other: Tensor, **rest: Any) -> Tensor:
        found.add((*x.shape, other.shape[1]))
        return real_mm(x, other, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "mm", mm)
        assert not list(wrong_products(tensors, max_rows))
    return found


def test_each_size_is_tried_with_powers_of_two_and_the_most_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {(32, 64), (48, 32), (32, 96)}
    assert tried(monkeypatch, weights(), 7) == {(rows, *size) for rows in (1, 2, 4, 7) for size in sizes}


def test_logits_are_tried_with_as_many_rows_as_a_step_has_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    found = tried(monkeypatch, weights(), 4 * MAX_LOGIT_ROWS)
    assert max(rows for rows, *size in found if size == [32, 96]) == MAX_LOGIT_ROWS
    assert max(rows for rows, *size in found if size == [32, 64]) == 4 * MAX_LOGIT_ROWS


def test_products_in_f32_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tried(monkeypatch, weights(torch.float32), 64) == set()


def test_weights_that_are_not_finite_are_not_the_device_s_fault() -> None:
    """The engine names them by the logits that they give."""
    damaged = weights()
    damaged["0.qkv"][5, 7] = torch.nan
    assert not list(wrong_products(damaged, 4))
