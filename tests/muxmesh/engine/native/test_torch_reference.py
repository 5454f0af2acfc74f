"""The forward pass in plain torch, on the CPU and on a GPU where there is one: logits within 1e-4 of transformers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from muxmesh.engine.native.step_layout import lay_out
from muxmesh.engine.native.torch_reference import TorchReferenceForward
from muxmesh.engine.step import Chunk, SampleSpec, Step
from muxmesh.models.model_spec import read_model_spec
from muxmesh.models.weight_image import ensure_image
from muxmesh.types import Sampling
from tests.support.tiny import SHAPES, reference, tiny_view, write_tiny_model

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
GREEDY = SampleSpec(Sampling(temperature=0.0), 0)


class Case:
    def __init__(self, folder: Path, cache: Path, device: str) -> None:
        spec = read_model_spec(folder)
        image = ensure_image(folder, spec, "rows", cache, lambda done, total: None)
        self.model: Any = reference(folder)
        self.view = tiny_view(spec)
        self.forward = TorchReferenceForward(spec, image, self.view, spec.context_len, device)

    def logits(self, *chunks: Chunk) -> np.ndarray:
        return self.forward.logits(lay_out(Step(chunks), self.view))

    def expected(self, token_ids: list[int]) -> np.ndarray:
        with torch.inference_mode():
            logits: np.ndarray = self.model(torch.tensor([token_ids])).logits[0, -1].numpy()
        return logits


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    # Products of a GPU in f32 may else use only some of its bits.
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield request.param
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda name: name.replace(" ", "-"))
def test_ragged_batches_of_prompts_chunks_and_decodes(tmp_path: Path, shape: str, device: str) -> None:
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
        assert np.abs(case.logits(*chunks) - np.stack(expected)).max() < 1e-4


def test_a_step_that_wants_no_logits_still_writes_its_kv(tmp_path: Path, device: str) -> None:
    case = Case(write_tiny_model(tmp_path / "model", SHAPES["gqa"]), tmp_path, device)
    assert case.logits(Chunk(0, 0, (5, 6, 7), (3,))).shape == (0, 259)
    (after,) = case.logits(Chunk(0, 3, (8,), (3,), GREEDY))
    assert np.abs(after - case.expected([5, 6, 7, 8])).max() < 1e-4
