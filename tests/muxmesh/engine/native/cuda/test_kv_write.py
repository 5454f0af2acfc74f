from __future__ import annotations

import math

import pytest
import torch

from muxmesh.engine.native.cuda.kv_write import write_kv
from tests.support.paged_kv import paged_kv, token_elements
from tests.support.triton_interpreter import DEVICE


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("head_dim", "block_size"), [(26, 8), (64, 32)])
def test_rows_go_to_their_token_blocks_and_nowhere_else(kv_dtype: torch.dtype, head_dim: int, block_size: int) -> None:
    kv = paged_kv([20, 41], head_dim=head_dim, block_size=block_size, dtype=kv_dtype)
    pool = torch.full_like(kv.pool, math.nan)
    positions = list(range(3, 20)) + list(range(40, 41))
    ids = torch.cat([kv.rows(0, range(3, 20))[0], kv.rows(1, [40])[0]])
    at = torch.tensor(positions, dtype=torch.int32, device=DEVICE)
    qkv = torch.randn(len(positions), 6, head_dim, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    write_kv(pool, kv.layout, 1, qkv[:, 2:4], qkv[:, 4:], ids, at)
    for row, position in enumerate(positions):
        stored = token_elements(pool, kv.layout, 1, int(ids[row]), position % block_size)
        expected = torch.stack([qkv[row, 2:4], qkv[row, 4:]], 1).to(kv_dtype)
        assert torch.allclose(stored.float(), expected.float(), rtol=2**-7 if kv_dtype == torch.bfloat16 else 0)
        stored.fill_(math.nan)
    assert pool.isnan().all()


def test_a_row_without_a_token_block_is_not_written() -> None:
    kv = paged_kv([20])
    before = kv.pool.clone()
    ids = torch.tensor([-1, -1], dtype=torch.int32, device=DEVICE)
    k = torch.ones(2, 2, 32, device=DEVICE)
    write_kv(kv.pool, kv.layout, 1, k, k, ids, torch.zeros_like(ids))
    assert torch.equal(kv.pool.nan_to_num(7), before.nan_to_num(7))


def test_shapes_that_do_not_fit_are_refused() -> None:
    kv = paged_kv([20])
    k, ids = torch.ones(2, 2, 32, device=DEVICE), torch.zeros(2, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match=r"v is \[2, 1, 32\].*\[2, 2, 32\]"):
        write_kv(kv.pool, kv.layout, 1, k, k[:, :1], ids, ids)
    with pytest.raises(ValueError, match=r"positions is torch\.int64"):
        write_kv(kv.pool, kv.layout, 1, k, k, ids, ids.long())
