"""Arranges a step for the device: rows padded to a batch bucket, in one int32 array that is uploaded at once. Pure.

Rows of sequences with one new token, the decode rows, come first, so that a kernel sees them at the start of each
tensor, whatever else is in the step. Their number is padded to a bucket: kernels and graphs exist for these sizes only.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from muxmesh.engine.native.cuda.attention_plan import AttentionPlan, prefill_tiles
from muxmesh.engine.step import Chunk

_ALIGNMENT = 16
"""Of the parts of an array, in elements: kernels are compiled for pointers to multiples of 16 bytes."""


@dataclass(frozen=True, slots=True)
class StepRows:
    """The rows of a step.

    ``chunks``: those of the step, decode rows first. ``num_decodes``: decode rows with padding. ``arrays``, int32:
    token_ids, positions [rows]; block_ids [rows], -1 for padding; context_lens [num_decodes], 0 for padding; tables
    [num_decodes + other chunks, most blocks of a chunk]; tiles [tiles, 4]; logit_rows: the rows whose logits are
    requested, in the order of ``chunks``.
    """

    chunks: Sequence[Chunk]
    num_decodes: int
    arrays: Mapping[str, np.ndarray]


def decode_buckets(max_num_seqs: int) -> tuple[int, ...]:
    """Returns the numbers of decode rows that a step may have, ascending; the last is ``max_num_seqs``.

    A padded row costs time in each step, and a bucket costs time at load, so the gaps grow with the size.
    """
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_num_seqs, 32)]
    return (*(size for size in sizes if size < max_num_seqs), max_num_seqs)


def arrange(chunks: Sequence[Chunk], buckets: Sequence[int], plan: AttentionPlan) -> StepRows:
    """Returns the rows of a step. Raises ValueError if it has more decode rows than the largest bucket."""
    decodes = [chunk for chunk in chunks if len(chunk.token_ids) == 1]
    others = [chunk for chunk in chunks if len(chunk.token_ids) > 1]
    num_decodes = _bucket(len(decodes), buckets)
    lengths = [len(chunk.token_ids) for chunk in others]
    *starts, num_rows = itertools.accumulate(lengths, initial=num_decodes)
    ordered = [*decodes, *others]
    block_size = plan.layout.block_size
    token_ids, positions = np.zeros(num_rows, dtype=np.int32), np.zeros(num_rows, dtype=np.int32)
    block_ids = np.full(num_rows, -1, dtype=np.int32)
    tables = np.zeros((num_decodes + len(others), max(len(chunk.block_ids) for chunk in chunks)), dtype=np.int32)
    one_each = slice(len(decodes))
    token_ids[one_each] = [chunk.token_ids[0] for chunk in decodes]
    positions[one_each] = [chunk.start for chunk in decodes]
    for table, chunk in zip(tables, decodes, strict=False):
        table[: len(chunk.block_ids)] = chunk.block_ids
    block_ids[one_each] = tables[np.arange(len(decodes)), positions[one_each] // block_size]
    for table, chunk, first in zip(tables[num_decodes:], others, starts, strict=True):
        rows = slice(first, first + len(chunk.token_ids))
        token_ids[rows] = chunk.token_ids
        positions[rows] = np.arange(chunk.start, chunk.start + len(chunk.token_ids))
        table[: len(chunk.block_ids)] = chunk.block_ids
        block_ids[rows] = table[positions[rows] // block_size]
    context_lens = np.where(block_ids[:num_decodes] >= 0, positions[:num_decodes] + 1, 0).astype(np.int32)
    tiles = prefill_tiles(plan, starts, lengths, [chunk.start for chunk in others])
    tiles[:, 2] += num_decodes
    arrays = {
        "token_ids": token_ids,
        "positions": positions,
        "block_ids": block_ids,
        "context_lens": context_lens,
        "tables": tables,
        "tiles": tiles,
        "logit_rows": _logit_rows(ordered, [*range(len(decodes)), *starts]),
    }
    return StepRows(ordered, num_decodes, arrays)


def _logit_rows(chunks: Sequence[Chunk], first_rows: Sequence[int]) -> np.ndarray:
    logit_rows: list[int] = []
    for chunk, first in zip(chunks, first_rows, strict=True):
        end = first + len(chunk.token_ids)
        logit_rows += range(end - chunk.num_logit_rows, end)
    return np.array(logit_rows, dtype=np.int32)


def _bucket(num_decodes: int, buckets: Sequence[int]) -> int:
    if not num_decodes:
        return 0
    if num_decodes > buckets[-1]:
        raise ValueError(f"a step has {num_decodes} sequences with one token; the runner is for {buckets[-1]}")
    return next(size for size in buckets if size >= num_decodes)


def pack(arrays: Mapping[str, np.ndarray]) -> tuple[np.ndarray, dict[str, slice]]:
    """Returns one int32 array with the bits of all ``arrays``, each aligned, and which part of it each is."""
    parts: dict[str, slice] = {}
    end = 0
    for name, array in arrays.items():
        size = array.nbytes // np.dtype(np.int32).itemsize
        parts[name] = slice(end, end + size)
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    packed = np.zeros(max(end, 1), dtype=np.int32)  # torch views no empty tensor as another dtype
    for name, array in arrays.items():
        packed[parts[name]] = np.ascontiguousarray(array).reshape(-1).view(np.int32)
    return packed, parts
