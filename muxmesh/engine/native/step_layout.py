"""Arranges the chunks of a step as rows of a matrix. Pure arithmetic, the same for every device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from muxmesh.device.kv_view import KvGeometry
from muxmesh.engine.step import Step


@dataclass(frozen=True, slots=True)
class StepLayout:
    """The rows of a step: the tokens of all chunks, one chunk after the other. Integers are int64.

    token_ids, positions [rows]: each token and its position in its sequence. row_blocks [rows]: pool offset of the
    token block that stores its KV. tables [chunks, most blocks of a chunk]: pool offsets of the token blocks of each
    sequence, 0 past its last block. starts, lengths [chunks]: the rows of each chunk. logit_rows: the rows whose logits
    are requested, in order. Offsets count elements of the KV dtype.
    """

    token_ids: np.ndarray
    positions: np.ndarray
    row_blocks: np.ndarray
    tables: np.ndarray
    starts: Sequence[int]
    lengths: Sequence[int]
    logit_rows: np.ndarray


def lay_out(step: Step, geometry: KvGeometry) -> StepLayout:
    """Returns the layout of a step with at least one chunk."""
    block_size = geometry.shape.block_size
    lengths = [len(chunk.token_ids) for chunk in step.chunks]
    ends = np.cumsum(lengths)
    starts = (ends - lengths).tolist()
    tables = np.zeros((len(step.chunks), max(len(chunk.block_ids) for chunk in step.chunks)), dtype=np.int64)
    positions = np.empty(ends[-1], dtype=np.int64)
    row_blocks = np.empty(ends[-1], dtype=np.int64)
    logit_rows: list[int] = []
    for index, chunk in enumerate(step.chunks):
        rows = slice(starts[index], starts[index] + lengths[index])
        tables[index, : len(chunk.block_ids)] = geometry.block_offsets(chunk.block_ids)
        positions[rows] = np.arange(chunk.start, chunk.start + lengths[index])
        row_blocks[rows] = tables[index][positions[rows] // block_size]
        logit_rows += range(rows.stop - chunk.num_logit_rows, rows.stop)
    return StepLayout(
        token_ids=np.array([token for chunk in step.chunks for token in chunk.token_ids], dtype=np.int64),
        positions=positions,
        row_blocks=row_blocks,
        tables=tables,
        starts=starts,
        lengths=lengths,
        logit_rows=np.array(logit_rows, dtype=np.int64),
    )
