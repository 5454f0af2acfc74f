import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from muxmesh.clock import SystemClock
from muxmesh.device.torch_device import Event, InterpretedDevice, open_torch_device
from muxmesh.engine.native.cuda.weights import load_weights
from muxmesh.errors import DeviceError
from muxmesh.models.model_spec import read_model_spec
from muxmesh.models.stored_dtypes import from_bfloat16
from muxmesh.models.weight_image import ensure_image, map_image
from muxmesh.types import Dtype
from tests.support.processes import ended_popen
from tests.support.shared_memory import mapped_tensor, new_shared
from tests.support.tiny import SHAPES, write_tiny_model
from tests.support.triton_interpreter import DEVICE

CHUNK_BYTES = 4096
CLOCK = SystemClock()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[Dtype, Path]:
    """One small model in every dtype."""
    folder = write_tiny_model(tmp_path_factory.mktemp("model"), SHAPES["qwen2"])
    cache, spec = tmp_path_factory.mktemp("cache"), read_model_spec(folder)
    return {
        dtype: ensure_image(folder, spec, "rows", cache, lambda done, total: None, dtype) for dtype in get_args(Dtype)
    }


class Shared:
    """Memory and weights page of a model, as kvstore owns them."""

    def __init__(self, num_bytes: int) -> None:
        self.segment_fd, self.page_fd = new_shared(num_bytes), new_shared(4096)
        self.segment = mapped_tensor(self.segment_fd)

    @property
    def word(self) -> int:
        return int.from_bytes(os.pread(self.page_fd, 8, 0), "little")

    @word.setter
    def word(self, value: int) -> None:
        os.pwrite(self.page_fd, value.to_bytes(8, "little"), 0)

    def close(self) -> None:
        for fd in (self.segment_fd, self.page_fd):
            os.close(fd)


@pytest.fixture
def shared(images: dict[Dtype, Path]) -> Iterator[Shared]:
    memory = Shared(images["bfloat16"].stat().st_size)
    yield memory
    memory.close()


class CountingDevice(InterpretedDevice):
    """Numbers the points that were recorded: one after each copy, one at the end. ``last_waited``: the latest that was
    waited for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_recorded, self.last_waited = 0, 0

    def record(self) -> Event:
        self.num_recorded += 1
        return _CountedEvent(self, self.num_recorded)


class _CountedEvent:
    def __init__(self, device: CountingDevice, number: int) -> None:
        self._device = device
        self._number = number

    def wait(self) -> None:
        self._device.last_waited = max(self._device.last_waited, self._number)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> CountingDevice:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return CountingDevice()


def as_f32(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.to(torch.float32).numpy()
    return array


@pytest.mark.parametrize("dtype", get_args(Dtype))
@pytest.mark.parametrize("chunk_bytes", [CHUNK_BYTES, 1 << 24])
def test_every_tensor_of_the_image_is_a_view_of_the_shared_memory(
    images: dict[Dtype, Path], device: CountingDevice, dtype: Dtype, chunk_bytes: int
) -> None:
    memory = Shared(images[dtype].stat().st_size + 100)
    weights = load_weights(images[dtype], memory.segment, memory.page_fd, device, CLOCK, chunk_bytes)
    image = map_image(images[dtype])
    first, last = memory.segment.data_ptr(), memory.segment.data_ptr() + memory.segment.numel()
    for name in image.parts:
        expected = image.get(name)
        values = from_bfloat16(expected) if dtype == "bfloat16" else expected.astype(np.float32)
        tensor = weights[name]
        assert tensor.dtype == getattr(torch, dtype) and tensor.shape == values.shape
        assert first <= tensor.data_ptr() < last and tensor.data_ptr() % tensor.element_size() == 0
        assert np.array_equal(as_f32(tensor), values), name
    assert weights.keys() == image.parts.keys()
    assert memory.word == 1
    memory.close()


@pytest.mark.parametrize("chunk_bytes", [CHUNK_BYTES, 1 << 24])
def test_the_device_of_this_run_gets_the_bytes_of_the_image(images: dict[Dtype, Path], chunk_bytes: int) -> None:
    """On a GPU with TRITON_INTERPRET=0, over pinned memory and the copy stream."""
    image, page_fd = images["float16"], new_shared(4096)
    memory = torch.zeros(image.stat().st_size, dtype=torch.uint8, device=DEVICE)
    load_weights(image, memory, page_fd, open_torch_device(), CLOCK, chunk_bytes)
    os.close(page_fd)
    assert bytes(memory.cpu().numpy()) == image.read_bytes()


def test_every_copy_is_waited_for_before_the_weights_count_as_loaded(
    images: dict[Dtype, Path], shared: Shared, device: CountingDevice
) -> None:
    load_weights(images["bfloat16"], shared.segment, shared.page_fd, device, CLOCK, CHUNK_BYTES)
    assert device.last_waited == device.num_recorded == -(-images["bfloat16"].stat().st_size // CHUNK_BYTES) + 1


def test_weights_that_are_loaded_are_not_copied_again(
    images: dict[Dtype, Path], shared: Shared, device: CountingDevice
) -> None:
    first = load_weights(images["bfloat16"], shared.segment, shared.page_fd, device, CLOCK)
    num_copies = device.num_recorded
    second = load_weights(images["bfloat16"], mapped_tensor(shared.segment_fd), shared.page_fd, device, CLOCK)
    assert device.num_recorded == num_copies > 0
    assert torch.equal(first["lm_head"], second["lm_head"])


def test_weights_are_copied_again_after_the_word_was_reset(
    images: dict[Dtype, Path], shared: Shared, device: CountingDevice
) -> None:
    load_weights(images["bfloat16"], shared.segment, shared.page_fd, device, CLOCK)
    shared.segment.zero_()
    shared.word = 0
    weights = load_weights(images["bfloat16"], shared.segment, shared.page_fd, device, CLOCK)
    assert weights["lm_head"].abs().sum() > 0 and shared.word == 1


def test_memory_that_is_too_small_is_refused(images: dict[Dtype, Path], shared: Shared, device: CountingDevice) -> None:
    sizes = [images[dtype].stat().st_size for dtype in ("bfloat16", "float32")]
    with pytest.raises(DeviceError, match=rf"weights has {sizes[0]} bytes; .*-rows-v4\.f32 has {sizes[1]}"):
        load_weights(images["float32"], shared.segment, shared.page_fd, device, CLOCK)
    assert shared.word == 0 and device.num_recorded == 0


def test_an_image_that_ends_early_does_not_count_as_loaded(
    images: dict[Dtype, Path], tmp_path: Path, shared: Shared, device: CountingDevice
) -> None:
    class ShrinkingDevice(CountingDevice):
        def record(self) -> Event:
            os.truncate(cut, 2 * CHUNK_BYTES)
            return super().record()

    cut = tmp_path / "cut.bf16"
    cut.write_bytes(images["bfloat16"].read_bytes())
    shrinking = ShrinkingDevice()
    with pytest.raises(DeviceError, match=r"cut\.bf16 ends before the size that it had"):
        load_weights(cut, shared.segment, shared.page_fd, shrinking, CLOCK, CHUNK_BYTES)
    assert shared.word == 0
    assert shrinking.last_waited == shrinking.num_recorded > 2, "no copy is in flight when the next worker begins"
    load_weights(images["bfloat16"], shared.segment, shared.page_fd, device, CLOCK)
    assert shared.word == 1


def loader(image: Path, shared: Shared, stop_after: int = 0) -> subprocess.Popen[str]:
    """Starts a worker that loads ``image`` and stops after a chunk until it gets a line."""
    numbers = (shared.segment_fd, shared.page_fd, CHUNK_BYTES, stop_after)
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.weight_loader", str(image), *map(str, numbers)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=(shared.segment_fd, shared.page_fd),
    )


def is_locked(shared: Shared) -> bool:
    own = os.open(f"/proc/self/fd/{shared.page_fd}", os.O_RDWR)
    try:
        fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(own)
    return False


def lines_of(process: subprocess.Popen[str]) -> list[str]:
    """What the process prints after it got a line. Fails unless it succeeds."""
    output, _ = process.communicate("\n", timeout=60)
    assert process.returncode == 0
    return output.splitlines()


def test_of_two_workers_one_copies_and_the_other_waits(images: dict[Dtype, Path], shared: Shared) -> None:
    image = images["bfloat16"]
    with ended_popen(loader(image, shared, stop_after=2)) as first:
        assert first.stdout is not None
        assert [first.stdout.readline() for _ in range(2)] == ["recorded 1\n", "recorded 2\n"]
        with ended_popen(loader(image, shared)) as second:
            assert is_locked(shared) and shared.word == 0 and second.poll() is None
            *recorded, norm = lines_of(first)
            assert recorded[-1] == f"recorded {-(-image.stat().st_size // CHUNK_BYTES) + 1}" and shared.word == 1
            assert lines_of(second) == [norm]


def test_the_next_worker_copies_again_when_the_first_is_killed_in_the_middle(
    images: dict[Dtype, Path], shared: Shared
) -> None:
    image = images["bfloat16"]
    num_chunks = -(-image.stat().st_size // CHUNK_BYTES)
    with ended_popen(loader(image, shared, stop_after=3)) as first:
        assert first.stdout is not None
        assert [first.stdout.readline() for _ in range(3)] == ["recorded 1\n", "recorded 2\n", "recorded 3\n"]
        with ended_popen(loader(image, shared)) as second:
            assert is_locked(shared) and shared.word == 0 and second.poll() is None
            first.kill()
            *recorded, norm = lines_of(second)
    assert recorded == [f"recorded {number}" for number in range(1, num_chunks + 2)], "all chunks, and the end"
    with ended_popen(loader(image, shared)) as third:
        assert lines_of(third) == [norm], "nothing is copied a second time"
    assert bytes(shared.segment.numpy()) == image.read_bytes()
