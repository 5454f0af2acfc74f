from __future__ import annotations

import numpy as np
import pytest

from muxmesh.device.kv_view import KvGeometry
from muxmesh.engine.native.cuda.kv_layout import KvLayout
from muxmesh.models.model_spec import KvShape

SHAPE = KvShape(num_layers=3, num_kv_heads=2, head_dim=32, block_size=16, dtype_bytes=2)


@pytest.mark.parametrize("rest", [0, 96])
def test_token_blocks_lie_where_the_geometry_says(rest: int) -> None:
    geometry = KvGeometry(SHAPE, 5 * SHAPE.token_block_bytes + rest)
    layout = KvLayout.of(geometry)
    ids = np.arange(23)
    offsets = ids * layout.token_block_elements + ids // layout.blocks_per_slab * layout.slab_rest
    assert offsets.tolist() == geometry.block_offsets(ids.tolist()).tolist()
    assert layout.one_stride == (rest == 0)


def test_a_slab_of_half_elements_is_refused() -> None:
    with pytest.raises(ValueError, match="no whole number of elements of 2 bytes"):
        KvLayout.of(KvGeometry(SHAPE, SHAPE.token_block_bytes + 1))


@pytest.mark.parametrize(("head_dim", "rest", "alignment"), [(64, 0, 16), (80, 96, 16), (26, 0, 2), (64, 16, 8)])
def test_the_start_of_a_token_is_aligned(head_dim: int, rest: int, alignment: int) -> None:
    shape = KvShape(num_layers=3, num_kv_heads=2, head_dim=head_dim, block_size=16, dtype_bytes=2)
    assert KvLayout.of(KvGeometry(shape, 5 * shape.token_block_bytes + rest)).alignment == alignment
