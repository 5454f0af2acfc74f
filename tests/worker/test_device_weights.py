"""Weights of a model on the fake driver: kvstore owns their memory, and its workers are processes that load them."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio
import torch

from muxmesh.engine.native.cuda.weights import image_tensors
from muxmesh.models.model_spec import read_model_spec
from muxmesh.models.weight_image import ensure_image, read_layout
from muxmesh.types import Role
from tests.support.cuda_unit import CudaUnit, WorkerProcess, cuda_unit
from tests.support.tiny import TinyShape, write_tiny_model


@pytest_asyncio.fixture
async def unit(tmp_path: Path) -> AsyncIterator[CudaUnit]:
    """A unit whose model has a real weight image in bfloat16."""
    folder = write_tiny_model(tmp_path / "model", TinyShape())
    written = ensure_image(folder, read_model_spec(folder), "rows", tmp_path, lambda *layers: None, "bfloat16")
    (tmp_path / "image").write_bytes(written.read_bytes())
    async with cuda_unit(tmp_path) as running:
        yield running


async def loaded_norm(unit: CudaUnit, worker: WorkerProcess) -> list[float]:
    values: list[float] = (await worker.run("load_weights", str(image_of(unit))))["norm"]
    return values


def image_of(unit: CudaUnit) -> Path:
    image = unit.runtime.prepared_model("u", "m").image
    assert image is not None
    return image


def change_image(image: Path) -> list[float]:
    """Doubles the tensor `norm` in the file; returns it."""
    layout, content = read_layout(image), bytearray(image.read_bytes())
    norm = image_tensors(layout, torch.frombuffer(content, dtype=torch.uint8))["norm"]
    norm *= 2
    image.write_bytes(content)
    values: list[float] = norm.tolist()
    return values


async def test_all_workers_of_a_model_have_the_copy_of_the_first_even_after_it_was_killed(unit: CudaUnit) -> None:
    """The image changes after the first load: who copied it again would have other weights."""
    prefill, decode = [await unit.start_worker(role) for role in Role]
    first = await loaded_norm(unit, prefill)
    assert any(first)
    changed = change_image(image_of(unit))
    assert changed != first
    assert await loaded_norm(unit, decode) == first
    await prefill.kill()
    await unit.until(lambda status: len(status.workers) == 1)
    assert await loaded_norm(unit, await unit.start_worker(Role.PREFILL)) == first


async def test_a_new_kvstore_has_new_memory_for_the_weights_of_the_image_of_that_time(
    unit: CudaUnit, tmp_path: Path
) -> None:
    first = await loaded_norm(unit, await unit.start_worker(Role.PREFILL))
    unit.process.kill()
    await unit.process.wait()
    changed = change_image(image_of(unit))
    async with cuda_unit(tmp_path) as successor:
        assert await loaded_norm(successor, await successor.start_worker(Role.PREFILL)) == changed != first
