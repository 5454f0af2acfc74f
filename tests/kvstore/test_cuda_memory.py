"""Device memory of a unit on the fake driver: what is allocated, how it is passed on, what an error leaves behind."""

import os
from collections.abc import Callable

import pytest

from kvstore.cuda_memory import CudaMemory
from kvstore.device_memory import CUDA, Segment, Transport
from muxmesh.cuda.driver import CudaDriver
from muxmesh.device.cuda_mapping import map_segment
from muxmesh.errors import DeviceError
from tests.support.fake_driver import NUM_SMS, UUID, device_resources, fake_driver_library, output_on_fake

MIB = 1 << 20
WEIGHTS = {"a": 5 * MIB, "b": 1}


@pytest.fixture(scope="module")
def driver() -> CudaDriver:
    return CudaDriver(fake_driver_library())


def segments_of(memory: CudaMemory) -> list[Segment]:
    """The pool's segment and those of the weights."""
    weights = [memory.weights(model) for model in WEIGHTS]
    return [memory.shards[0].segments[0], *(one.segment for one in weights if one is not None)]


@pytest.mark.parametrize("legacy_ipc", [False, True])
def test_sizes_are_rounded_up_to_the_granularity_and_segments_name_their_device(
    driver: CudaDriver, legacy_ipc: bool
) -> None:
    memory = CudaMemory(driver, 0, 3 * MIB, WEIGHTS, legacy_ipc)
    assert (memory.kind, memory.num_sms) == (CUDA, NUM_SMS)
    assert [segment.size_bytes for segment in segments_of(memory)] == [4 * MIB, 6 * MIB, 2 * MIB]
    assert {segment.device_uuid for segment in segments_of(memory)} == {UUID}
    assert memory.shards[0].size_bytes == 4 * MIB
    assert memory.weights("other") is None
    memory.close()


def test_a_segment_is_passed_on_by_a_file_descriptor_of_its_own(driver: CudaDriver) -> None:
    memory = CudaMemory(driver, 0, 4 * MIB, WEIGHTS)
    assert memory.transport is Transport.VMM_FD
    fds = [fd for segment in segments_of(memory) for fd in segment.fds]
    assert len(set(fds)) == 3 and not any(map(os.get_inheritable, fds))
    assert {segment.ipc_handle for segment in segments_of(memory)} == {b""}
    pool = map_segment(driver, 0, 4 * MIB, fds[0], b"")
    weights = map_segment(driver, 0, 6 * MIB, fds[1], b"")
    driver.copy_to_device(pool.address, b"kv")
    content = bytearray(2)
    driver.copy_to_host(content, weights.address)
    assert content == b"\0\0", "each segment is memory of its own"
    memory.close()
    driver.copy_to_host(content, pool.address)
    assert content == b"kv", "a mapping keeps the memory"
    for mapping in (pool, weights):
        mapping.close(driver)


def test_legacy_ipc_passes_segments_on_by_handles(driver: CudaDriver) -> None:
    memory = CudaMemory(driver, 0, 4 * MIB, WEIGHTS, legacy_ipc=True)
    assert memory.transport is Transport.LEGACY_IPC
    segments = segments_of(memory)
    assert [segment.fds for segment in segments] == [(), (), ()]
    assert [len(segment.ipc_handle) for segment in segments] == [64, 64, 64]
    assert len({segment.ipc_handle for segment in segments}) == 3
    memory.close()


@pytest.mark.parametrize("legacy_ipc", [False, True])
def test_all_is_given_back(driver: CudaDriver, legacy_ipc: bool) -> None:
    before = device_resources()
    memory = CudaMemory(driver, 0, 4 * MIB, WEIGHTS, legacy_ipc)
    assert device_resources() != before
    memory.close()
    assert device_resources() == before


def test_the_weights_page_says_whether_the_weights_are_complete(driver: CudaDriver) -> None:
    memory = CudaMemory(driver, 0, 2 * MIB, WEIGHTS)
    pages = [weights.page_fd for model in WEIGHTS if (weights := memory.weights(model)) is not None]
    assert [os.pread(page, 8, 0) for page in pages] == [bytes(8)] * 2
    os.pwrite(pages[1], (1).to_bytes(8, "little"), 0)
    memory.forget_weights()
    assert [os.pread(page, 8, 0) for page in pages] == [bytes(8)] * 2
    memory.close()


@pytest.mark.parametrize(
    ("pool_bytes", "weights_bytes", "message"),
    [
        (
            1 << 40,
            {},
            rf"cannot allocate {1 << 40} bytes for the KV pool on fake device 0 \({UUID}, .* bytes in all\): ",
        ),
        (2 * MIB, {"a": MIB, "b": 1 << 40}, rf"cannot allocate {1 << 40} bytes for the weights of b on fake device 0"),
    ],
)
@pytest.mark.parametrize("legacy_ipc", [False, True])
def test_memory_that_does_not_fit_is_named_and_nothing_stays_allocated(
    driver: CudaDriver, pool_bytes: int, weights_bytes: dict[str, int], message: str, legacy_ipc: bool
) -> None:
    before = device_resources()
    with pytest.raises(DeviceError, match=message + r".*CUDA_ERROR_OUT_OF_MEMORY \(2\): the device has too little"):
        CudaMemory(driver, 0, pool_bytes, weights_bytes, legacy_ipc)
    assert device_resources() == before


FUNCTIONS = {
    False: ("cuDeviceGet", "cuDeviceGetName", "cuDeviceGetUuid_v2", "cuDeviceTotalMem_v2", "cuDeviceGetAttribute",
            "cuMemGetAllocationGranularity", "cuMemCreate", "cuMemExportToShareableHandle"),
    True: ("cuCtxSetCurrent", "cuMemAlloc_v2", "cuIpcGetMemHandle"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("legacy_ipc", "function"), [(way, name) for way, names in FUNCTIONS.items() for name in names]
)
def test_an_error_of_any_call_is_reported_and_nothing_stays_allocated(
    driver: CudaDriver, legacy_ipc: bool, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = device_resources()
    monkeypatch.setenv("FAKE_CUDA_ERRORS", f"{function}:304")
    with pytest.raises(DeviceError, match=rf"{function} failed: CUDA_ERROR_OPERATING_SYSTEM \(304\)"):
        CudaMemory(driver, 0, 4 * MIB, WEIGHTS, legacy_ipc)
    assert device_resources() == before


@pytest.mark.parametrize("function", ["cuMemRelease", "cuMemFree_v2"])
def test_what_the_driver_does_not_take_back_hinders_nothing_else(
    driver: CudaDriver, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = CudaMemory(driver, 0, 4 * MIB, WEIGHTS, legacy_ipc=function == "cuMemFree_v2")
    page_fds = [weights.page_fd for model in WEIGHTS if (weights := memory.weights(model)) is not None]
    monkeypatch.setenv("FAKE_CUDA_ERRORS", f"{function}:304")
    memory.close()
    for fd in page_fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


IN_A_PROCESS = """
import logging
from kvstore.cuda_memory import CudaMemory
from muxmesh.cuda.driver import CudaDriver
logging.basicConfig(format="%(message)s")
try:
    memory = CudaMemory(CudaDriver(), 0, 4 << 20, {})
    print(memory.transport, memory.shards[0].segments[0].device_uuid)
except Exception as error:
    print(error)
"""

SITUATIONS: dict[str, tuple[Callable[[], dict[str, str]], str]] = {
    "no descriptors": (lambda: {"FAKE_CUDA_ATTRIBUTES": "103=0"}, "legacy ipc"),
    "no virtual memory management": (lambda: {"FAKE_CUDA_ATTRIBUTES": "102=0"}, "legacy ipc"),
    "a client of MPS": (lambda: {"FAKE_CUDA_ATTRIBUTES": "133=1"}, "kvstore is a client of CUDA MPS"),
    "no GPU": (lambda: {"CUDA_VISIBLE_DEVICES": "GPU-0"}, "cuInit failed: CUDA_ERROR_NO_DEVICE (100): no device is"),
}


@pytest.mark.parametrize("situation", list(SITUATIONS))
def test_what_the_device_can_share_decides_the_transport(situation: str) -> None:
    settings, expected = SITUATIONS[situation]
    output, errors = output_on_fake(IN_A_PROCESS, **settings())
    assert output.startswith(expected)
    assert ("exports no file descriptors of its memory: legacy IPC is used" in errors) is (expected == "legacy ipc")
