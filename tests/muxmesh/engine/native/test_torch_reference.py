"""The forward pass in plain torch against transformers, on the CPU and, if there is one, on a GPU."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from muxmesh.engine.native.cpu.forward import open_cpu_forward
from muxmesh.engine.native.cpu.thread_team import Team
from muxmesh.engine.native.step_layout import lay_out
from muxmesh.engine.native.torch_reference import TorchReferenceForward
from muxmesh.engine.step import Chunk, PromptScoring, SampleSpec, Step
from muxmesh.models.model_spec import read_model_spec
from muxmesh.models.weight_image import ensure_image
from muxmesh.types import Sampling
from tests.support.tiny import SHAPES, reference, tiny_view, write_tiny_model

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
GREEDY = SampleSpec(Sampling(temperature=0.0), 0)
TOLERANCE = 1e-4


class Case:
    """A model in transformers and in the forward pass under test, which has a pool of its own."""

    def __init__(self, folder: Path, cache: Path, device: str, block_size: int = 16) -> None:
        spec = read_model_spec(folder)
        image = ensure_image(folder, spec, "rows", cache, lambda done, total: None)
        self.model: Any = reference(folder)
        self.view = tiny_view(spec, block_size)
        self.forward = TorchReferenceForward(spec, image, self.view, spec.context_len, device)

    def logits(self, *chunks: Chunk) -> np.ndarray:
        return self.forward.logits(lay_out(Step(chunks), self.view))

    def expected(self, token_ids: list[int]) -> np.ndarray:
        with torch.inference_mode():
            logits: np.ndarray = self.model(torch.tensor([token_ids])).logits[0, -1].numpy()
        return logits


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    # By default, f32 products on a GPU may use fewer bits.
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield request.param
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda name: name.replace(" ", "-"))
def test_ragged_batches_of_chunks_have_the_logits_of_transformers(tmp_path: Path, shape: str, device: str) -> None:
    case = Case(write_tiny_model(tmp_path / "model", SHAPES[shape]), tmp_path, device)
    rng = np.random.default_rng(3)
    sequences = [rng.integers(3, 259, length).tolist() for length in (37, 5, 16, 50)]
    tables = [(9, 2, 30, 11), (4, 5, 6, 7), (31, 0, 3, 1), (20, 10, 12, 13)]
    done = [0] * len(sequences)
    while any(at < len(sequence) for at, sequence in zip(done, sequences, strict=True)):
        chunks, expected = [], []
        for job, sequence in enumerate(sequences):
            count = min(int(rng.integers(1, 20)), len(sequence) - done[job])
            if count:
                part = tuple(sequence[done[job] : done[job] + count])
                chunks.append(Chunk(job, done[job], part, tables[job], GREEDY))
                done[job] += count
                expected.append(case.expected(sequence[: done[job]]))
        assert np.abs(case.logits(*chunks) - np.stack(expected)).max() < TOLERANCE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "gqa", SHAPES["gqa"])


def test_a_step_without_logits_still_writes_its_kv(folder: Path, tmp_path: Path, device: str) -> None:
    case = Case(folder, tmp_path, device)
    assert case.logits(Chunk(0, 0, (5, 6, 7), (3,))).shape == (0, 259)
    (after,) = case.logits(Chunk(0, 3, (8,), (3,), GREEDY))
    assert np.abs(after - case.expected([5, 6, 7, 8])).max() < TOLERANCE


@pytest.mark.parametrize("block_size", [8, 32])
def test_other_block_sizes_have_the_logits_of_transformers(
    folder: Path, tmp_path: Path, device: str, block_size: int
) -> None:
    case = Case(folder, tmp_path, device, block_size)
    tokens, table = tuple(range(3, 48)), (5, 3, 8, 1, 6, 7)
    case.logits(Chunk(0, 0, tokens[:30], table))
    (logits,) = case.logits(Chunk(0, 30, tokens[30:], table, GREEDY))
    assert np.abs(logits - case.expected(list(tokens))).max() < TOLERANCE


def test_scored_rows_have_the_logits_of_every_prefix(folder: Path, tmp_path: Path, device: str) -> None:
    case = Case(folder, tmp_path, device)
    tokens = (9, 8, 7, 6)
    logits = case.logits(Chunk(0, 0, tokens, (3,), None, PromptScoring(tokens[1:], 0)))
    expected = np.stack([case.expected(list(tokens[:end])) for end in range(1, 5)])
    assert np.abs(logits - expected).max() < TOLERANCE


@pytest.mark.parametrize("shape", ["gqa", "qwen2", "qwen3"])
def test_each_pass_continues_on_the_kv_of_the_other(tmp_path: Path, shape: str) -> None:
    model = write_tiny_model(tmp_path / "model", SHAPES[shape])
    case = Case(model, tmp_path, "cpu")
    spec = read_model_spec(model)
    image = ensure_image(model, spec, "panels", tmp_path, lambda done, total: None)
    compiled = open_cpu_forward(spec, image, case.view, spec.context_len, Team(1))
    tokens, table = tuple(range(3, 40)), (9, 2, 30)
    compiled.logits(lay_out(Step((Chunk(0, 0, tokens[:20], table),)), case.view))
    (by_torch,) = case.logits(Chunk(0, 20, tokens[20:36], table, GREEDY))
    assert np.abs(by_torch - case.expected(list(tokens[:36]))).max() < TOLERANCE
    (by_kernels,) = compiled.logits(lay_out(Step((Chunk(0, 36, tokens[36:], table, GREEDY),)), case.view))
    assert np.abs(by_kernels - case.expected(list(tokens))).max() < TOLERANCE
