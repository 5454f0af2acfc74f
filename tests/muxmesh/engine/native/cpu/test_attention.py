"""Attention over the pool against a softmax in f64. KV that no row may read is NaN."""

# mypy: disable-error-code="no-untyped-call"
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from muxmesh.device.kv_view import KvView
from muxmesh.engine.native.cpu.attention import SPAN, SPLIT, attend, merge
from muxmesh.engine.native.cpu.forward import Shape
from muxmesh.engine.native.cpu.thread_team import Team, new_counters
from muxmesh.models.model_spec import KvShape

LAYER = 1
LONGEST = 2 * SPLIT + 40


@dataclass(frozen=True)
class Heads:
    """The sizes of one attention layer."""

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    block_size: int = 16

    @property
    def shape(self) -> Shape:
        return Shape(2, 64, self.heads, self.kv_heads, self.head_dim, 96, 100, self.block_size, 1e-5)

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class Query:
    """The last ``rows`` positions of a sequence of ``context`` tokens attend to all positions up to their own."""

    context: int
    rows: int = 1

    @property
    def positions(self) -> range:
        return range(self.context - self.rows, self.context)


class Sequences:
    """Random K and V of sequences, stored in a pool of NaN whose blocks are in random order."""

    def __init__(self, heads: Heads, queries: Sequence[Query], seed: int = 0, scale: float = 1.0) -> None:
        self.heads, self.queries = heads, queries
        rng = np.random.default_rng(seed)
        shape = KvShape(2, heads.kv_heads, heads.head_dim, heads.block_size, 4)
        counts = [-(-query.context // heads.block_size) for query in queries]
        pool = np.full(sum(counts) * shape.token_block_bytes // 4, np.nan, dtype=np.float32)
        self.view = KvView(shape, shape.token_block_bytes, pool)
        order = rng.permutation(sum(counts))
        ends = np.cumsum(counts)
        self.block_ids = [order[end - count : end].tolist() for end, count in zip(ends, counts, strict=True)]
        size = (heads.kv_heads, heads.head_dim)
        self.kv = [rng.standard_normal((2, query.context, *size)) * scale for query in queries]
        for index, query in enumerate(queries):
            self.store(index, self.kv[index], range(query.context))
        self.q = rng.standard_normal((sum(query.rows for query in queries), heads.heads, heads.head_dim)) * scale

    def store(self, index: int, kv: np.ndarray, positions: range) -> None:
        """Writes K and V [2, tokens, kv heads, head_dim] of a sequence at ``positions``."""
        heads = self.heads
        blocks = self.view.pool.reshape(-1, 2, heads.kv_heads, 2, heads.head_dim * heads.block_size)[:, LAYER]
        for position in positions:
            block, slot = blocks[self.block_ids[index][position // heads.block_size]], position % heads.block_size
            block[:, 0].reshape(heads.kv_heads, heads.head_dim, heads.block_size)[:, :, slot] = kv[0, position]
            block[:, 1].reshape(heads.kv_heads, heads.block_size, heads.head_dim)[:, slot] = kv[1, position]

    def expected(self) -> np.ndarray:
        """Softmax attention of every row in f64, [rows, heads * head_dim]."""
        outputs, row = [], 0
        for query, (keys, values) in zip(self.queries, self.kv, strict=True):
            for position in query.positions:
                for head in range(self.heads.heads):
                    seen = np.s_[: position + 1, head // self.heads.group]
                    scores = keys[seen] @ self.q[row, head] / np.sqrt(self.heads.head_dim)
                    weights = np.exp(scores - scores.max())
                    outputs.append(weights @ values[seen] / weights.sum())
                row += 1
        return np.concatenate(outputs).reshape(row, -1)


def attention(sequences: Sequences, tile_rows: int = 4, num_threads: int = 1) -> np.ndarray:
    """Runs `attend` and, if a tile has several splits, `merge`, as the forward pass does."""
    heads = sequences.heads
    columns = heads.heads * heads.head_dim
    qkv = np.full((len(sequences.q), columns + 2 * heads.kv_heads * heads.head_dim + 16), np.nan, dtype=np.float32)
    qkv[:, :columns] = sequences.q.reshape(len(sequences.q), -1)
    tables = np.zeros((len(sequences.queries), max(map(len, sequences.block_ids))), dtype=np.int64)
    tiles: list[tuple[int, int, int, int, int]] = []
    tasks: list[tuple[int, int]] = []
    positions: list[int] = []
    for index, query in enumerate(sequences.queries):
        tables[index, : len(sequences.block_ids[index])] = sequences.view.block_offsets(sequences.block_ids[index])
        start = len(positions)
        positions += query.positions
        for first in range(0, query.rows, tile_rows):
            rows = min(tile_rows, query.rows - first)
            splits = positions[start + first + rows - 1] // SPLIT + 1
            tiles.append((start + first, rows, index, len(tasks), splits))
            tasks += [(len(tiles) - 1, split) for split in range(splits)]
    has_splits = any(tile[4] > 1 for tile in tiles)
    most_queries = max(tile[1] for tile in tiles) * heads.group
    partials = np.full((len(tasks) * heads.kv_heads * has_splits, most_queries, heads.head_dim + 2), np.nan, np.float32)
    out = np.full((len(positions), columns + 16), 9.0, dtype=np.float32)
    counters, all_tiles = new_counters(2), np.array(tiles, dtype=np.int64)
    address, pool, team = counters.ctypes.data, sequences.view.pool.ctypes.data, Team(num_threads)
    steps = (heads.shape, pool, LAYER, qkv, np.array(positions), tables, all_tiles, np.array(tasks), partials, out)
    team.run(functools.partial(attend, address, 0, *steps))
    if has_splits:
        team.run(functools.partial(merge, address, 1, heads.shape, all_tiles, partials, out))
    assert (out[:, columns:] == 9.0).all(), "columns after the heads are not written"
    return out[:, :columns]


def check(heads: Heads, *queries: Query) -> None:
    sequences = Sequences(heads, queries)
    assert np.abs(attention(sequences) - sequences.expected()).max() < 1e-5


SIZES = [
    Heads(),
    Heads(heads=3, kv_heads=3),
    Heads(heads=6, kv_heads=1, head_dim=32),
    Heads(head_dim=26),
    Heads(head_dim=80),
    Heads(head_dim=128),
    Heads(block_size=8),
    Heads(block_size=32),
    Heads(heads=2, kv_heads=1, head_dim=256, block_size=8),
]


@pytest.mark.parametrize("heads", SIZES, ids=str)
def test_heads_and_blocks_of_any_size_have_the_attention_of_softmax(heads: Heads) -> None:
    check(heads, Query(1), Query(37, rows=37), Query(heads.block_size), Query(SPAN + 9, rows=3))


@pytest.mark.parametrize("context", [1, 2, 15, 16, 17, SPAN - 1, SPAN, SPAN + 1, 3 * SPAN])
def test_a_decode_at_the_boundaries_of_blocks_and_spans(context: int) -> None:
    check(Heads(), Query(context))


@pytest.mark.parametrize("context", [SPLIT - 1, SPLIT, SPLIT + 1, SPLIT + SPAN, 2 * SPLIT, LONGEST])
@pytest.mark.parametrize("rows", [1, 6])
def test_the_splits_of_a_long_sequence_are_merged(context: int, rows: int) -> None:
    check(Heads(), Query(context, rows))


def test_a_batch_of_short_and_long_sequences() -> None:
    check(Heads(), Query(3, rows=3), Query(LONGEST), Query(90, rows=20), Query(SPLIT + 2, rows=5), Query(1))


QUERIES = [Query(SPAN + 11, rows=23), Query(SPLIT + 4, rows=9), Query(1), Query(30)]


@pytest.mark.parametrize("tile_rows", [1, 3, 8, 12])
@pytest.mark.parametrize("heads", [Heads(), Heads(head_dim=26, block_size=8)], ids=str)
def test_a_row_has_the_same_bits_in_tiles_of_any_size(heads: Heads, tile_rows: int) -> None:
    sequences = Sequences(heads, QUERIES)
    assert np.array_equal(attention(sequences, tile_rows), attention(sequences, tile_rows=5))


def test_a_team_computes_what_one_thread_computes() -> None:
    sequences = Sequences(Heads(), QUERIES)
    assert np.array_equal(attention(sequences, num_threads=4), attention(sequences))


def test_a_sequence_has_the_same_bits_alone_and_in_a_batch() -> None:
    sequences = Sequences(Heads(), QUERIES)
    together, row = attention(sequences), 0
    for index, query in enumerate(QUERIES):
        alone = Sequences(Heads(), [query])
        alone.kv = [sequences.kv[index]]
        alone.store(0, alone.kv[0], range(query.context))
        alone.q = sequences.q[row : row + query.rows]
        assert np.array_equal(attention(alone), together[row : row + query.rows])
        row += query.rows


@pytest.mark.parametrize("later", [np.nan, np.inf, 1e30])
def test_a_row_does_not_attend_to_later_positions(later: float) -> None:
    """The last row of a tile sees every token of it, the rows before it do not."""
    query = Query(40, rows=4)
    sequences = Sequences(Heads(), [query])
    before = attention(sequences)
    changed = sequences.kv[0].copy()
    changed[0, -1] = later
    changed[1, -1] = 1e30
    sequences.store(0, changed, range(39, 40))
    after = attention(sequences)
    assert np.array_equal(after[:3], before[:3])
    assert not np.array_equal(after[3], before[3])


@pytest.mark.parametrize("scale", [1e-3, 10.0, 60.0])
def test_small_and_large_scores_neither_underflow_nor_overflow(scale: float) -> None:
    sequences = Sequences(Heads(), [Query(SPLIT + 30, rows=3), Query(5)], scale=scale)
    assert np.abs(attention(sequences) / scale - sequences.expected() / scale).max() < 1e-3


def test_equal_scores_give_the_mean_of_the_values() -> None:
    sequences = Sequences(Heads(), [Query(SPLIT + 77)])
    sequences.q = np.zeros_like(sequences.q)
    means = sequences.kv[0][1].mean(axis=0).repeat(2, axis=0)
    assert np.abs(attention(sequences).reshape(4, 16) - means).max() < 1e-5


def test_a_dominant_score_gives_its_value() -> None:
    heads = Heads(heads=1, kv_heads=1)
    for position in (0, SPAN - 1, SPAN, SPLIT, SPLIT + 19):
        sequences = Sequences(heads, [Query(SPLIT + 20)])
        sequences.q = np.ones_like(sequences.q)
        sequences.kv[0][0] = -10.0
        sequences.kv[0][0, position] = 10.0
        sequences.store(0, sequences.kv[0], range(SPLIT + 20))
        assert np.abs(attention(sequences)[0] - sequences.kv[0][1, position, 0]).max() < 1e-6


def test_query_heads_read_the_kv_head_of_their_group() -> None:
    heads = Heads(heads=6, kv_heads=3)
    sequences = Sequences(heads, [Query(9)])
    before = attention(sequences).reshape(6, 16)
    sequences.kv[0][:, :, 1] += 1.0
    sequences.store(0, sequences.kv[0], range(9))
    changed = (attention(sequences).reshape(6, 16) != before).any(axis=1)
    assert changed.tolist() == [False, False, True, True, False, False]


def test_another_order_of_the_blocks_in_the_pool_changes_no_bit() -> None:
    first = Sequences(Heads(), QUERIES)
    second = Sequences(Heads(), QUERIES, seed=1)
    second.kv, second.q = first.kv, first.q
    for index, query in enumerate(QUERIES):
        second.store(index, second.kv[index], range(query.context))
    assert first.block_ids != second.block_ids
    assert np.array_equal(attention(first), attention(second))
