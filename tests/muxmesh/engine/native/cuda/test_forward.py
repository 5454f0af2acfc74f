"""The forward pass on the device against transformers, in Triton's interpreter."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from muxmesh.device.torch_device import TorchDevice, open_torch_device
from muxmesh.engine.step import Chunk, PromptScoring, SampleSpec
from muxmesh.types import Sampling
from tests.support.device_model import ForwardCase
from tests.support.tiny import SHAPES, reference, write_tiny_model
from tests.support.triton_interpreter import multiply_bf16_exactly

GREEDY = SampleSpec(Sampling(temperature=0.0), 0)
TABLES = {1: (9, 2), 2: (4, 31), 3: (0, 7)}
TOKENS = {job: np.random.default_rng(job).integers(3, 259, 24).tolist() for job in TABLES}


@pytest.fixture(scope="module")
def device() -> TorchDevice:
    multiply_bf16_exactly()
    return open_torch_device()


def chunk(job: int, start: int, end: int, **more: Any) -> Chunk:
    return Chunk(job, start, tuple(TOKENS[job][start:end]), TABLES[job], **{"sample": GREEDY} | more)


def expected(model: Any, job: int, end: int) -> torch.Tensor:
    """The reference's logits after each of the first ``end`` tokens."""
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([TOKENS[job][:end]])).logits[0]
    return logits


@pytest.mark.parametrize("shape", [name for name in SHAPES if SHAPES[name].dtype == "float32"])
def test_chunks_and_decode_rows_of_one_step_have_the_logits_of_transformers(
    tmp_path: Path, shape: str, device: TorchDevice
) -> None:
    folder = write_tiny_model(tmp_path / "model", SHAPES[shape])
    case, model = ForwardCase(folder, tmp_path, device), reference(folder)
    case.logits(chunk(1, 0, 15), chunk(2, 0, 3, sample=None))
    got = case.logits(chunk(2, 3, 20), chunk(1, 15, 16), chunk(3, 0, 1))
    for job, end in ((1, 16), (2, 20), (3, 1)):
        assert (got[job][-1] - expected(model, job, end)[-1]).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "tolerance"),
    [
        (torch.float16, torch.float16, 0.01),
        (torch.bfloat16, torch.bfloat16, 0.08),
        (torch.float32, torch.bfloat16, 0.05),
    ],
    ids=str,
)
def test_other_dtypes_stay_near_the_reference(
    tmp_path: Path, dtype: torch.dtype, kv_dtype: torch.dtype, tolerance: float, device: TorchDevice
) -> None:
    folder = write_tiny_model(tmp_path / "model", SHAPES["qwen3"])
    case, model = ForwardCase(folder, tmp_path, device, dtype, kv_dtype), reference(folder)
    case.logits(chunk(1, 0, 15), chunk(2, 0, 3))
    got = case.logits(chunk(2, 3, 20), chunk(1, 15, 16))
    for job, end in ((1, 16), (2, 20)):
        wanted = expected(model, job, end)[-1]
        assert (got[job][-1] - wanted).abs().max() < tolerance * wanted.abs().max()
        assert got[job].dtype == torch.float32


def test_scored_chunks_have_the_logits_of_every_row(tmp_path: Path, device: TorchDevice) -> None:
    folder = write_tiny_model(tmp_path / "model", SHAPES["gqa"])
    case, model = ForwardCase(folder, tmp_path, device), reference(folder)
    scoring = PromptScoring(tuple(TOKENS[1][1:19]), 2)
    got = case.logits(chunk(1, 0, 18, scoring=scoring), chunk(2, 0, 4, sample=None))
    assert (got[1] - expected(model, 1, 18)).abs().max() < 1e-4
    assert got[2].shape == (0, 259)
