"""Whether products of matrices are right on this device, tried with the weights of a model before it serves.

cuBLAS computes large parts of a step in f16 and bf16 wrongly in a client of MPS that has a percentage of the SMs of a
GPU of compute capability 9.0: its kernels for clusters of blocks leave out tiles, without an error (docs/arbiter.md).
Which products are wrong depends on the number of SMs and on the sizes, so each size of the model is tried.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from muxmesh.errors import DeviceError
from muxmesh.models.device_capacity import MAX_LOGIT_ROWS

MAX_ERROR = 0.05
"""Of a product over its largest value. bf16 has 8 bits, and a split product adds parts that are rounded."""
_OUTPUTS_AT_ONCE = 4096
"""Outputs that are computed in f32 at once, which bounds the memory."""


def check_products(weights: Mapping[str, Tensor], max_rows: int, num_sms: int) -> None:
    """Raises DeviceError, with what would be right, if a product with a weight of this model's sizes is wrong.

    ``max_rows``: rows of the largest step. Products in f32 are not tried: they are by other kernels.
    """
    wrong = list(wrong_products(weights, max_rows))
    if not wrong:
        return
    first, dtype = wrong[0], str(next(iter(weights.values())).dtype).removeprefix("torch.")
    raise DeviceError(
        f"{len(wrong)} products in {dtype} are wrong on {num_sms} SMs, such as {first}: the libraries of this GPU "
        "leave out parts of them if MPS limits a process to a percentage of its SMs; if green_contexts of the unit is "
        "false, set it to auto, else set compute_share: 100 of the model, or dtype: float32"
    )


def wrong_products(weights: Mapping[str, Tensor], max_rows: int) -> Iterator[str]:
    """Yields the products that differ from f32, of each size with the powers of two of rows and the most rows, as
    text like `[16, 1024] x [1024, 4096]`.
    """
    for name, weight in _of_each_size(weights):
        outputs, inputs = weight.shape
        for rows in _numbers_of_rows(min(max_rows, MAX_LOGIT_ROWS) if name == "lm_head" else max_rows):
            chance = torch.Generator(device=weight.device).manual_seed(rows)
            x = torch.randn((rows, inputs), generator=chance, dtype=weight.dtype, device=weight.device)
            unwritten = torch.full((rows, outputs), torch.nan, dtype=weight.dtype, device=weight.device)
            product = torch.mm(x, weight.t(), out=unwritten)
            added = torch.ones_like(product).addmm_(x, weight.t())
            if not _are_right(((product, 0.0), (added, 1.0)), x, weight):
                yield f"[{rows}, {inputs}] x [{inputs}, {outputs}]"


def _of_each_size(weights: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
    """The first matrix of each size that a step multiplies by in 16 bits."""
    found: dict[torch.Size, tuple[str, Tensor]] = {}
    for name, weight in weights.items():
        if weight.dim() == 2 and name != "embed" and weight.dtype.itemsize == 2:
            found.setdefault(weight.shape, (name, weight))
    return found.values()


def _numbers_of_rows(most: int) -> Iterator[int]:
    rows = 1
    while rows < most:
        yield rows
        rows *= 2
    yield most


def _are_right(results: Sequence[tuple[Tensor, float]], x: Tensor, weight: Tensor) -> bool:
    """Whether each result is nearly the product of ``x`` and the transposed ``weight``, plus its number. Waits for it.

    True of a product that is not finite, which is due to the weights.
    """
    largest, error = (torch.zeros(len(results), device=x.device) for _ in range(2))
    exact_x = x.float()
    for begin in range(0, len(weight), _OUTPUTS_AT_ONCE):
        exact = exact_x @ weight[begin : begin + _OUTPUTS_AT_ONCE].float().t()
        for index, (found, plus) in enumerate(results):
            difference = (found[:, begin : begin + _OUTPUTS_AT_ONCE].float() - (exact + plus)).abs().max()
            error[index] = torch.maximum(error[index], torch.nan_to_num(difference, nan=torch.inf))
            largest[index] = torch.maximum(largest[index], (exact + plus).abs().max())
    return bool(((error <= MAX_ERROR * largest) | ~largest.isfinite()).all())
