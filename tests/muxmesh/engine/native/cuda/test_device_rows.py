"""The rows of a step on the device, uploaded in one transfer."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from muxmesh.device.kv_view import KvGeometry
from muxmesh.device.torch_device import open_torch_device
from muxmesh.engine.native.cuda.attention_plan import AttentionPlan
from muxmesh.engine.native.cuda.device_rows import DeviceRows, device_rows, upload
from muxmesh.engine.native.cuda.kv_layout import KvLayout
from muxmesh.engine.native.cuda.step_rows import arrange
from muxmesh.engine.step import Chunk, SampleSpec
from muxmesh.models.model_spec import KvShape
from muxmesh.types import Sampling

DEVICE = open_torch_device()
SHAPE = KvShape(num_layers=1, num_kv_heads=2, head_dim=16, block_size=16, dtype_bytes=4)
PLAN = AttentionPlan.of(KvLayout.of(KvGeometry(SHAPE, 4 * SHAPE.token_block_bytes)), 4, 4, (9, 0), 4)
SAMPLE = SampleSpec(Sampling(), 0)
DECODE, PROMPT = Chunk(2, 17, (8,), (6, 7), SAMPLE), Chunk(1, 14, (5, 6, 7), (3, 9, 4), SAMPLE)


def rows_of(*chunks: Chunk, tables: torch.Tensor) -> DeviceRows:
    rows = arrange(chunks, (1, 2, 4), PLAN)
    return device_rows(rows, upload(DEVICE, rows.arrays), tables)


def tables_of(width: int) -> torch.Tensor:
    return torch.full((4, width), 99, dtype=torch.int32, device=DEVICE.torch_device)


def test_uploaded_arrays_keep_dtype_shape_and_values() -> None:
    arrays: dict[str, npt.NDArray[Any]] = {
        "matrix": np.arange(6, dtype=np.int32).reshape(2, 3),
        "transposed": np.arange(6, dtype=np.int64).reshape(3, 2).T,
        "numbers": np.array([0.1, -np.inf]),
        "halves": np.array([[0.5]], dtype=np.float32),
        "none": np.empty((2, 0), dtype=np.int64),
    }
    uploaded = upload(DEVICE, arrays)
    assert uploaded.keys() == arrays.keys()
    for name, array in arrays.items():
        got = uploaded[name].cpu().numpy()
        assert (got.dtype, got.shape, got.tolist()) == (array.dtype, array.shape, array.tolist())


def test_arrays_without_elements_are_uploaded_too() -> None:
    uploaded = upload(DEVICE, {"numbers": np.empty((4, 0)), "ids": np.empty(0, dtype=np.int64)})
    assert (uploaded["numbers"].dtype, uploaded["numbers"].shape) == (torch.float64, (4, 0))
    assert (uploaded["ids"].dtype, uploaded["ids"].shape) == (torch.int64, (0,))


def test_every_uploaded_array_begins_at_a_multiple_of_16_bytes() -> None:
    uploaded = upload(DEVICE, {str(size): np.zeros(size, dtype=np.int32) for size in (1, 3, 16, 17, 5)})
    assert [tensor.data_ptr() % 16 for tensor in uploaded.values()] == [0] * 5


def test_tables_are_copied_into_those_of_the_caller_and_the_rest_of_them_stays() -> None:
    tables = tables_of(5)
    rows = rows_of(DECODE, PROMPT, tables=tables)
    assert rows.tables is tables
    assert tables.tolist() == [[6, 7, 0, 99, 99], [3, 9, 4, 99, 99], [99] * 5, [99] * 5]
    assert (rows.num_decodes, rows.context_lens.tolist()) == (1, [18])
    assert rows.token_ids.tolist() == [8, 5, 6, 7] and rows.positions.tolist() == [17, 14, 15, 16]
    assert rows.block_ids.tolist() == [7, 3, 3, 9]
    assert rows.tiles is not None and rows.tiles.tolist() == [[1, 3, 1, 14]]


def test_blocks_past_the_longest_sequence_are_left_out() -> None:
    tables = tables_of(2)
    rows_of(DECODE, PROMPT, tables=tables)
    assert tables[:2].tolist() == [[6, 7], [3, 9]]


@pytest.mark.parametrize("num_decodes", [1, 3])
def test_a_step_of_decode_rows_has_no_tiles(num_decodes: int) -> None:
    assert rows_of(*[DECODE] * num_decodes, tables=tables_of(2)).tiles is None
