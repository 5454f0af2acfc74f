import math
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from muxmesh.device.kv_view import KvGeometry
from muxmesh.engine.native.cuda.kv_layout import KvLayout
from muxmesh.engine.native.cuda.row_kernels import HeadNorms, rotate_and_write, silu_and_multiply
from muxmesh.models.model_spec import KvShape
from tests.support.kv_rows import write_kv
from tests.support.paged_kv import token_elements
from tests.support.triton_interpreter import DEVICE

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
DTYPES = [pytest.param(dtype, id=str(dtype)) for dtype in TOLERANCE]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def error(got: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected number."""
    return float((got.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "has_norms"), [(16, True), (26, False), (80, True), (128, False)])
def test_q_is_rotated_and_k_and_v_are_in_the_slots_of_their_tokens(
    head_dim: int, has_norms: bool, dtype: torch.dtype
) -> None:
    check_rows(head_dim, has_norms, dtype, dtype, 16)


@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [(torch.float32, torch.bfloat16), (torch.float32, torch.float16), (torch.bfloat16, torch.float16)],
)
@pytest.mark.parametrize("block_size", [8, 32])
def test_k_and_v_are_converted_to_the_dtype_of_the_pool(
    block_size: int, dtype: torch.dtype, kv_dtype: torch.dtype
) -> None:
    check_rows(32, True, dtype, kv_dtype, block_size)


@pytest.mark.parametrize("kv_dtype", TOLERANCE)
def test_what_the_pool_has_no_number_for_is_nan_there(kv_dtype: torch.dtype) -> None:
    largest = torch.finfo(kv_dtype).max
    shape = KvShape(2, 2, 32, 16, kv_dtype.itemsize)
    layout = KvLayout.of(KvGeometry(shape, shape.token_block_bytes))
    pool = torch.zeros(layout.slab_elements, dtype=kv_dtype, device=DEVICE)
    values = torch.tensor([largest, -largest, math.inf, -math.inf, math.nan, 1.01 * largest])
    k = torch.zeros(6, 2, 32, device=DEVICE)
    k[:, 1, 7], k[:, 1, 30] = values, values
    positions, block_ids = torch.arange(6, dtype=torch.int32, device=DEVICE), torch.zeros(6, dtype=torch.int32)
    with np.errstate(all="ignore"):  # of the interpreter
        write_kv(pool, layout, 1, k, -k, block_ids.to(DEVICE), positions)
    for slot in range(6):
        for sign, head in zip((1, -1), token_elements(pool, layout, 1, 0, slot)[1], strict=True):
            expected = sign * values[slot].item() if slot < 2 else math.nan
            assert head[[7, 30]].tolist() == pytest.approx([expected] * 2, rel=0, nan_ok=True)
            assert not head.isinf().any()


def check_rows(head_dim: int, has_norms: bool, dtype: torch.dtype, kv_dtype: torch.dtype, block_size: int) -> None:
    """Rows of a sequence in blocks of several slabs; a row without a block is not written."""
    rows, heads, kv_heads, layer = 19, 4, 2, 1
    shape = KvShape(2, kv_heads, head_dim, block_size, kv_dtype.itemsize)
    layout = KvLayout.of(KvGeometry(shape, 3 * shape.token_block_bytes + 64))
    pool = torch.full((3 * layout.slab_elements,), math.nan, dtype=kv_dtype, device=DEVICE)
    qkv, angles = random(rows, heads + 2 * kv_heads, head_dim, dtype=dtype), random(64, head_dim // 2, seed=1)
    cos, sin = angles.cos(), angles.sin()
    positions = torch.arange(14, 14 + rows, dtype=torch.int32, device=DEVICE)
    block_ids = torch.tensor([7, 2, 5, 0, 4], dtype=torch.int32, device=DEVICE)[positions // block_size]
    block_ids[4] = -1
    weights = random(2, head_dim, dtype=dtype, seed=2)
    norms = HeadNorms(weights[0], weights[1], 1e-6) if has_norms else None
    q_out = torch.full((rows, heads, head_dim), math.nan, dtype=dtype, device=DEVICE)
    rotate_and_write(qkv, norms, cos, sin, positions, block_ids, pool, layout, layer, q_out)

    q, k, v = torch.split(qkv.double(), [heads, kv_heads, kv_heads], dim=1)
    if has_norms:
        q, k = (
            x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight
            for x, weight in zip((q, k), weights.double(), strict=True)
        )
    q, k = (rotated(x, cos[positions].double(), sin[positions].double()) for x in (q, k))
    assert error(q_out, q) < TOLERANCE[dtype]
    num_written = 0
    for row, head in product(range(rows), range(kv_heads)):
        if (block_id := int(block_ids[row])) < 0:
            continue
        block = block_id // 3 * layout.slab_elements + block_id % 3 * layout.token_block_elements
        start = block + (layer * kv_heads + head) * 2 * block_size * head_dim
        start += int(positions[row]) % block_size * head_dim
        for written, expected in ((start, k), (start + block_size * head_dim, v)):
            assert error(pool[written : written + head_dim], expected[row, head]) < TOLERANCE[kv_dtype]
            num_written += head_dim
    assert int((~pool.isnan()).sum()) == num_written, "nothing else is written"


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos[:, None] - b * sin[:, None], b * cos[:, None] + a * sin[:, None]], dim=-1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gate_is_silu_times_up(dtype: torch.dtype) -> None:
    gate_up = 4 * random(7, 2 * 330, dtype=dtype)
    out = torch.empty(7, 330, dtype=dtype, device=DEVICE)
    silu_and_multiply(gate_up, out)
    gate, up = gate_up.double().chunk(2, dim=-1)
    assert error(out, gate * gate.sigmoid() * up) < TOLERANCE[dtype]
