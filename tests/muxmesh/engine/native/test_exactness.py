"""Logits within 1e-4 of transformers: whole prompts, chunked prompts, ragged batched decode."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from muxmesh.engine.native.cpu.attention import SPAN, SPLIT
from muxmesh.engine.native.logits_runner import LogitsRunner
from muxmesh.engine.native.step_layout import lay_out
from muxmesh.engine.step import Chunk, SampleSpec, Step
from muxmesh.types import Sampling
from tests.support.tiny import SHAPES, TinyShape, reference, tiny_runner, write_tiny_model

TOLERANCE = 1e-4
GREEDY = SampleSpec(Sampling(temperature=0.0), 0)


class Case:
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
    return runner._forward.logits(lay_out(step, runner._view))


@pytest.fixture(scope="module", params=SHAPES, ids=lambda name: name.replace(" ", "-"))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"), SHAPES[request.param])
    return Case(folder, tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 63])
def test_a_whole_prompt(case: Case, length: int) -> None:
    prompt = case.prompt(length)
    (logits,) = case.logits(Chunk(1, 0, prompt, (9, 2, 30, 11), GREEDY))
    assert np.abs(logits - case.expected(prompt)).max() < TOLERANCE


@pytest.mark.parametrize("size", [1, 5, 16, 23])
def test_a_prompt_in_chunks(case: Case, size: int) -> None:
    prompt = case.prompt(50)
    for start in range(0, 50, size):
        part = prompt[start : start + size]
        last = start + len(part) == 50
        logits = case.logits(Chunk(1, start, part, (3, 17, 8, 1), GREEDY if last else None))
    assert np.abs(logits[0] - case.expected(prompt)).max() < TOLERANCE


def test_a_ragged_batch_of_decodes_and_a_prompt(case: Case) -> None:
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
def test_other_block_sizes(tmp_path: Path, block_size: int) -> None:
    case = Case(write_tiny_model(tmp_path / "model", SHAPES["gqa"]), tmp_path, block_size)
    prompt = case.prompt(45)
    case.logits(Chunk(1, 0, prompt[:30], (5, 3, 8, 1, 6, 7)))
    logits = case.logits(Chunk(1, 30, prompt[30:], (5, 3, 8, 1, 6, 7), GREEDY))
    assert np.abs(logits[0] - case.expected(prompt)).max() < TOLERANCE


def test_every_kv_byte_that_is_written_is_counted_and_lies_in_its_blocks(tmp_path: Path) -> None:
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
        token = case.runner.run(Step((Chunk(1, position, tuple(part), (7, 3, 9), GREEDY),))).sampled[1].token_id
        position, part = len(sequence), (token,)
        sequence.append(token)
        tokens.append(token)
    assert tokens == generated[0, 12:].tolist()


def test_a_sequence_longer_than_one_split(tmp_path: Path) -> None:
    """From `SPLIT` tokens on, ranges of a sequence are tasks of their own, merged at the end."""
    case = Case(write_tiny_model(tmp_path / "model", TinyShape(max_position_embeddings=1300)), tmp_path, num_slabs=24)
    prompt, table = case.prompt(1201), tuple(range(76))
    assert len(prompt) > 2 * SPLIT
    for start in range(0, 1200, 300):
        case.logits(Chunk(1, start, prompt[start : start + 300], table))
    logits = case.logits(Chunk(1, 1200, prompt[1200:], table, GREEDY))
    assert np.abs(logits[0] - case.expected(prompt)).max() < TOLERANCE


def test_a_row_has_the_same_bits_in_every_batch(tmp_path: Path) -> None:
    """200 random batches: prompts cut into chunks of random sizes beside random decodes, against each one alone.

    Some are about as long as a span, and as a split, of the attention kernel.
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
