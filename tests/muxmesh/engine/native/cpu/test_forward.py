"""The compiled forward pass against transformers, and against itself in other batches."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from muxmesh.device.kv_view import KvView
from muxmesh.engine.native.cpu import forward as forward_module
from muxmesh.engine.native.cpu.attention import QUERIES_PER_TILE, SPAN, SPLIT
from muxmesh.engine.native.cpu.forward import CpuForward, open_cpu_forward, spec_from_json, spec_to_json
from muxmesh.engine.native.cpu.thread_team import Team
from muxmesh.engine.native.logits_runner import LogitsRunner
from muxmesh.engine.native.step_layout import lay_out
from muxmesh.engine.step import Chunk, SampleSpec, Step
from muxmesh.models.model_spec import read_model_spec
from muxmesh.models.weight_image import ensure_image
from muxmesh.types import Sampling
from tests.support.tiny import SHAPES, TinyShape, reference, tiny_runner, tiny_view, write_tiny_model

TOLERANCE = 1e-4
GREEDY = SampleSpec(Sampling(temperature=0.0), 0)


class Case:
    """A model in transformers and in a runner with a pool of its own."""

    def __init__(self, folder: Path, cache: Path, block_size: int = 16, num_slabs: int = 8) -> None:
        self.model = reference(folder)
        self.runner, self.spec = tiny_runner(folder, cache, block_size, num_slabs)
        self.rng = np.random.default_rng(7)

    def prompt(self, length: int) -> tuple[int, ...]:
        return tuple(int(token) for token in self.rng.integers(3, 259, length))

    def expected(self, token_ids: tuple[int, ...]) -> np.ndarray:
        with torch.inference_mode():
            logits: np.ndarray = self.model(torch.tensor([token_ids])).logits[0, -1].numpy()
        return logits

    def logits(self, *chunks: Chunk) -> np.ndarray:
        return logits_of(self.runner, Step(chunks))


def logits_of(runner: LogitsRunner, step: Step) -> np.ndarray:
    assert runner._forward is not None
    return runner._forward.logits(lay_out(step, runner._view))


@pytest.fixture(scope="module", params=SHAPES, ids=lambda name: name.replace(" ", "-"))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"), SHAPES[request.param])
    return Case(folder, tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 63])
def test_a_whole_prompt_has_the_logits_of_transformers(case: Case, length: int) -> None:
    prompt = case.prompt(length)
    (logits,) = case.logits(Chunk(1, 0, prompt, (9, 2, 30, 11), GREEDY))
    assert np.abs(logits - case.expected(prompt)).max() < TOLERANCE


@pytest.mark.parametrize("size", [1, 5, 16, 23])
def test_a_prompt_in_chunks_has_the_logits_of_transformers(case: Case, size: int) -> None:
    prompt = case.prompt(50)
    for start in range(0, 50, size):
        part = prompt[start : start + size]
        last = start + len(part) == 50
        logits = case.logits(Chunk(1, start, part, (3, 17, 8, 1), GREEDY if last else None))
    assert np.abs(logits[0] - case.expected(prompt)).max() < TOLERANCE


def test_a_ragged_batch_of_decodes_and_a_prompt_has_the_logits_of_transformers(case: Case) -> None:
    prompts = [case.prompt(length) for length in (3, 16, 33)]
    tables = [(4, 5, 6), (31, 0, 2), (20, 10, 12)]
    for job, (prompt, table) in enumerate(zip(prompts, tables, strict=True)):
        case.logits(Chunk(job, 0, prompt, table))
    late = case.prompt(9)
    sequences = list(prompts)
    for turn in range(4):
        tokens = case.prompt(3)
        chunks = [Chunk(job, len(sequences[job]), (tokens[job],), tables[job], GREEDY) for job in range(len(prompts))]
        sequences = [(*sequence, token) for sequence, token in zip(sequences, tokens, strict=True)]
        expected = [case.expected(sequence) for sequence in sequences]
        if turn == 2:
            chunks.insert(1, Chunk(9, 0, late, (25,), GREEDY))
            expected.insert(1, case.expected(late))
        assert np.abs(case.logits(*chunks) - np.stack(expected)).max() < TOLERANCE


@pytest.mark.parametrize("block_size", [8, 32])
def test_other_block_sizes_have_the_logits_of_transformers(tmp_path: Path, block_size: int) -> None:
    case = Case(write_tiny_model(tmp_path / "model", SHAPES["gqa"]), tmp_path, block_size)
    prompt = case.prompt(45)
    case.logits(Chunk(1, 0, prompt[:30], (5, 3, 8, 1, 6, 7)))
    logits = case.logits(Chunk(1, 30, prompt[30:], (5, 3, 8, 1, 6, 7), GREEDY))
    assert np.abs(logits[0] - case.expected(prompt)).max() < TOLERANCE


def test_every_written_kv_byte_is_counted_and_is_in_a_block_of_the_sequence(tmp_path: Path) -> None:
    case = Case(write_tiny_model(tmp_path / "model", SHAPES["gqa"]), tmp_path)
    view = case.runner._view
    assert np.isnan(view.pool).all()
    outcome = case.runner.run(Step((Chunk(1, 0, case.prompt(20), (9, 2), GREEDY),)))
    written = np.flatnonzero(~np.isnan(view.pool))
    assert outcome.kv_bytes_written == written.size * 4 == 20 * view.shape.kv_bytes_per_token
    block = view.shape.token_block_bytes // 4
    allowed = np.concatenate([np.arange(start, start + block) for start in view.block_offsets((9, 2))])
    assert np.isin(written, allowed).all()


def test_greedy_tokens_are_those_of_transformers(case: Case) -> None:
    prompt = case.prompt(12)
    generated: Any = case.model.generate(
        torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    tokens, sequence = [], list(prompt)
    position, part = 0, prompt
    for _ in range(24):
        token = case.runner.run(Step((Chunk(1, position, tuple(part), (7, 3, 9), GREEDY),))).sampled[1][0].token_id
        position, part = len(sequence), (token,)
        sequence.extend((token,))
        tokens.append(token)
    assert tokens == generated[0, 12:].tolist()


def test_a_sequence_of_several_splits_has_the_logits_of_transformers(tmp_path: Path) -> None:
    case = Case(write_tiny_model(tmp_path / "model", TinyShape(max_position_embeddings=1300)), tmp_path, num_slabs=24)
    prompt, table = case.prompt(1201), tuple(range(76))
    assert len(prompt) > 2 * SPLIT
    for start in range(0, 1200, 300):
        case.logits(Chunk(1, start, prompt[start : start + 300], table))
    logits = case.logits(Chunk(1, 1200, prompt[1200:], table, GREEDY))
    assert np.abs(logits[0] - case.expected(prompt)).max() < TOLERANCE


def test_a_row_has_the_same_bits_in_every_batch(tmp_path: Path) -> None:
    """200 random batches of prompts in two chunks, each row against the same sequence alone.

    Some sequences are about as long as a span or a split of the attention kernel.
    """
    shape = TinyShape(num_heads=6, num_kv_heads=2, max_position_embeddings=600)
    case = Case(write_tiny_model(tmp_path / "model", shape), tmp_path, num_slabs=180)
    rng = np.random.default_rng(5)
    lengths = [
        *rng.integers(2, 90, 14),
        *rng.integers(SPAN - 8, SPAN + 12, 3),
        *rng.integers(SPLIT - 12, SPLIT + 18, 3),
    ]
    prompts = [case.prompt(int(length)) for length in lengths]
    tables = [tuple(range(34 * number, 34 * number + 34)) for number in range(21)]
    alone = []
    for prompt in prompts:
        case.logits(Chunk(1, 0, prompt[:-1], tables[20]))
        alone.append(case.logits(Chunk(1, len(prompt) - 1, prompt[-1:], tables[20], GREEDY))[0].copy())
    filler = Chunk(99, 0, (7,), (tables[20][-1],))
    for _ in range(200):
        chosen = [int(number) for number in rng.choice(20, int(rng.integers(1, 17)), replace=False)]
        start = {number: int(rng.integers(0, len(prompts[number]))) for number in chosen}
        case.logits(*(Chunk(n, 0, prompts[n][: start[n]], tables[n]) for n in chosen if start[n]), filler)
        rows = case.logits(*(Chunk(n, start[n], prompts[n][start[n] :], tables[n], GREEDY) for n in chosen))
        for number, row in zip(chosen, rows, strict=True):
            assert np.array_equal(row, alone[number])


@pytest.fixture(scope="module")
def gqa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "gqa", SHAPES["gqa"])


def open_forward(folder: Path, cache: Path, team: Team) -> tuple[CpuForward, KvView]:
    spec = read_model_spec(folder)
    image = ensure_image(folder, spec, "panels", cache, lambda done, total: None)
    view = tiny_view(spec)
    return open_cpu_forward(spec, image, view, spec.context_len, team), view


def mixed_step() -> Step:
    return Step(
        (
            Chunk(1, 0, tuple(range(3, 60)), (9, 2, 30, 11), GREEDY),
            Chunk(2, 0, tuple(range(90, 93)), (4,)),
            Chunk(3, 0, (7,), (5,), GREEDY),
        )
    )


def test_opening_the_pass_leaves_the_pool_untouched(gqa: Path, tmp_path: Path) -> None:
    _, view = open_forward(gqa, tmp_path, Team(1))
    assert np.isnan(view.pool).all()


def test_a_process_that_computes_loads_the_kernels_and_compiles_none(gqa: Path, tmp_path: Path) -> None:
    """What a process compiles itself differs in the last bits of sums from what others load from the cache."""
    open_forward(gqa, tmp_path, Team(1))
    assert sum(forward_module._run.stats.cache_misses.values()) == 0
    assert sum(forward_module._run.stats.cache_hits.values()) > 0


def test_the_spec_that_the_compiling_process_gets_is_that_of_the_model_but_for_rope_and_eos(gqa: Path) -> None:
    spec = replace(read_model_spec(gqa), rope_scaling=None, eos_token_ids=frozenset())
    assert spec_from_json(spec_to_json(spec)) == spec


@pytest.mark.parametrize("num_threads", [2, 5])
def test_the_number_of_threads_changes_no_bit(gqa: Path, tmp_path: Path, num_threads: int) -> None:
    one, one_view = open_forward(gqa, tmp_path, Team(1))
    several, several_view = open_forward(gqa, tmp_path, Team(num_threads))
    expected = one.logits(lay_out(mixed_step(), one_view))
    assert np.array_equal(several.logits(lay_out(mixed_step(), several_view)), expected)
    assert np.array_equal(several_view.pool, one_view.pool, equal_nan=True)


def test_logits_have_one_row_per_requested_row(gqa: Path, tmp_path: Path) -> None:
    forward, view = open_forward(gqa, tmp_path, Team(1))
    logits = forward.logits(lay_out(mixed_step(), view))
    assert logits.shape == (2, 259) and logits.dtype == np.float32
    assert forward.logits(lay_out(Step((Chunk(1, 0, (5, 6), (0,)),)), view)).shape == (0, 259)


def test_logits_belong_to_the_caller(gqa: Path, tmp_path: Path) -> None:
    forward, view = open_forward(gqa, tmp_path, Team(1))
    layout = lay_out(mixed_step(), view)
    first = forward.logits(layout)
    kept = first.copy()
    forward.logits(lay_out(Step((Chunk(7, 0, (100,), (20,), GREEDY),)), view))
    assert np.array_equal(first, kept)
    first[:] = 0.0
    assert np.array_equal(forward.logits(layout), kept)


def test_a_smaller_step_does_not_read_the_rows_of_a_larger_one(gqa: Path, tmp_path: Path) -> None:
    forward, view = open_forward(gqa, tmp_path, Team(1))
    small = lay_out(Step((Chunk(3, 0, (7,), (5,), GREEDY),)), view)
    alone = forward.logits(small).copy()
    forward.logits(lay_out(mixed_step(), view))
    assert np.array_equal(forward.logits(small), alone)


def test_tiles_cover_every_row_once_and_start_with_the_longest_task(gqa: Path, tmp_path: Path) -> None:
    forward, view = open_forward(gqa, tmp_path, Team(1))
    batch = forward._batch(lay_out(mixed_step(), view))
    rows = [row for first, count, *_ in batch.tiles.tolist() for row in range(first, first + count)]
    assert sorted(rows) == list(range(61))
    first_rows_of_prompt = [first for first, _, sequence, *_ in batch.tiles.tolist() if sequence == 0]
    assert first_rows_of_prompt == sorted(first_rows_of_prompt, reverse=True)
    assert batch.tiles[:, 1].max() * 2 <= QUERIES_PER_TILE, "two query heads share each KV head"


@pytest.mark.parametrize(("length", "splits"), [(1, 1), (SPLIT, 1), (SPLIT + 1, 2), (2 * SPLIT + 1, 3)])
def test_a_tile_has_one_task_per_split_up_to_its_last_row(gqa: Path, tmp_path: Path, length: int, splits: int) -> None:
    forward, view = open_forward(gqa, tmp_path, Team(1))
    step = Step((Chunk(1, 0, (5,), (0,), GREEDY), Chunk(2, length - 1, (5,), tuple(range(-(-length // 16))), GREEDY)))
    batch = forward._batch(lay_out(step, view))
    assert batch.tiles.tolist() == [[0, 1, 0, 0, 1], [1, 1, 1, 1, splits]]
    assert batch.tasks.tolist() == [[0, 0], *([1, split] for split in range(splits))]
