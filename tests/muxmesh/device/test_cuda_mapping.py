"""Segments of another process, mapped here, on the fake driver; kernels' access to them, by CPU tensors over them."""

import ctypes
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch

from muxmesh.cuda.driver import CudaDriver
from muxmesh.device.cuda_mapping import CudaSegments, map_segment
from muxmesh.errors import DeviceError
from tests.support.fake_driver import OTHER_UUID, UUID, device_resources, fake_driver_environment, fake_driver_library

SIZE = 4 << 20

OWNER = """
import os, sys
from muxmesh.cuda.driver import CudaDriver
driver = CudaDriver()
driver.use_primary_context(0)
address = driver.allocate(int(sys.argv[1]))
driver.copy_to_device(address, b"from the owner")
print(driver.ipc_handle(address).hex(), flush=True)
sys.stdin.readline()
content = bytearray(14)
driver.copy_to_host(content, address)
print(content.decode(), flush=True)
"""

READER = """
import sys, torch
from muxmesh.cuda.driver import CudaDriver
from muxmesh.device.cuda_mapping import CudaSegments, map_segment
driver, size = CudaDriver(), 4 << 20
handle = driver.create(0, size)
fd = driver.export_fd(handle)
first, second = (map_segment(driver, 0, size, fd, b"").tensor(torch.device("cpu")) for _ in range(2))
first[:4] = torch.tensor([1, 2, 3, 4], dtype=torch.uint8)
print(second[:6].tolist(), first.data_ptr() != second.data_ptr(), flush=True)
"""
"""CPU tensors over two imports of the same memory: what an interpreted kernel writes in one process into the pool."""


@pytest.fixture(scope="module")
def driver() -> CudaDriver:
    return CudaDriver(fake_driver_library())


@pytest.fixture
def undo() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def fd(driver: CudaDriver, undo: ExitStack) -> int:
    """A descriptor of `SIZE` bytes of device memory."""
    handle = driver.create(0, SIZE)
    undo.callback(driver.release, handle)
    descriptor = driver.export_fd(handle)
    undo.callback(os.close, descriptor)
    return descriptor


def test_a_mapping_needs_neither_the_descriptor_nor_the_handle(driver: CudaDriver) -> None:
    before = device_resources()
    handle = driver.create(0, SIZE)
    descriptor = driver.export_fd(handle)
    mapping = map_segment(driver, 0, SIZE, descriptor, b"")
    os.close(descriptor)
    driver.release(handle)
    driver.copy_to_device(mapping.address + SIZE - 4, b"last")
    content = bytearray(4)
    driver.copy_to_host(content, mapping.address + SIZE - 4)
    assert content == b"last"
    mapping.close(driver)
    assert device_resources() == before


@pytest.mark.parametrize("num_bytes", [SIZE // 2, SIZE * 2])
def test_a_segment_of_another_size_is_refused_and_not_mapped(driver: CudaDriver, fd: int, num_bytes: int) -> None:
    before = device_resources()
    message = rf"cannot map {num_bytes} bytes of shared device memory: .*\(801\): the size differs from that of the all"
    with pytest.raises(DeviceError, match=message):
        map_segment(driver, 0, num_bytes, fd, b"")
    assert device_resources() == before


def test_a_segment_without_a_descriptor_or_a_handle_is_refused(driver: CudaDriver) -> None:
    with pytest.raises(DeviceError, match="came with neither a file descriptor nor an IPC handle"):
        map_segment(driver, 0, SIZE, None, b"")


@pytest.mark.parametrize(
    "function",
    [
        "cuCtxSetCurrent",
        "cuMemImportFromShareableHandle",
        "cuMemAddressReserve",
        "cuMemMap",
        "cuMemSetAccess",
        "cuMemRelease",
    ],
)
def test_an_error_of_any_call_is_reported_and_leaves_no_mapping(
    driver: CudaDriver, fd: int, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = device_resources()
    monkeypatch.setenv("FAKE_CUDA_ERRORS", f"{function}:304")
    with pytest.raises(DeviceError, match=rf"{function} failed: CUDA_ERROR_OPERATING_SYSTEM \(304\)"):
        map_segment(driver, 0, SIZE, fd, b"")
    monkeypatch.delenv("FAKE_CUDA_ERRORS")
    after = device_resources()
    if function == "cuMemRelease":  # the handle of the import itself cannot be given back
        after -= before
        assert sum(after.values()) == 1 and next(iter(after)).startswith("fd ")
    else:
        assert after == before


@pytest.fixture
def owner(driver: CudaDriver) -> Iterator[subprocess.Popen[str]]:
    command = (sys.executable, "-c", OWNER, str(SIZE))
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=fake_driver_environment(), stdin=pipe, stdout=pipe, text=True) as process:
        yield process
        process.kill()


def handle_of(owner: subprocess.Popen[str]) -> bytes:
    assert owner.stdout is not None
    return bytes.fromhex(owner.stdout.readline())


def test_a_legacy_handle_maps_the_owners_memory(driver: CudaDriver, owner: subprocess.Popen[str]) -> None:
    before = device_resources()
    mapping = map_segment(driver, 0, SIZE, None, handle_of(owner))
    content = bytearray(14)
    driver.copy_to_host(content, mapping.address)
    assert content == b"from the owner"
    driver.copy_to_device(mapping.address, b"from this side")
    output, _ = owner.communicate("\n")
    assert output == "from this side\n"
    mapping.close(driver)
    assert device_resources() == before


def test_memory_of_a_legacy_handle_dies_with_its_owner(driver: CudaDriver, owner: subprocess.Popen[str]) -> None:
    mapping = map_segment(driver, 0, SIZE, None, handle_of(owner))
    owner.kill()
    owner.wait()
    with pytest.raises(DeviceError, match=r"cuMemcpyHtoD_v2 failed: CUDA_ERROR_ILLEGAL_ADDRESS"):
        driver.copy_to_device(mapping.address, b"lost")
    mapping.close(driver)


BAD_HANDLES: dict[str, tuple[Callable[[bytes], bytes], int, str]] = {
    "smaller than it should be": (lambda handle: handle, 2 * SIZE, f"has {SIZE} bytes, not {2 * SIZE}"),
    "not a handle": (lambda _: bytes(64), SIZE, r"cuIpcOpenMemHandle_v2 failed: CUDA_ERROR_INVALID_VALUE"),
    "cut": (lambda handle: handle[:10], SIZE, "an IPC handle has 64 bytes, not 10"),
}


@pytest.mark.parametrize("what", list(BAD_HANDLES))
def test_a_legacy_handle_that_does_not_fit_is_refused_and_not_mapped(
    driver: CudaDriver, owner: subprocess.Popen[str], what: str
) -> None:
    change, num_bytes, message = BAD_HANDLES[what]
    before = device_resources()
    with pytest.raises(DeviceError, match=message):
        map_segment(driver, 0, num_bytes, None, change(handle_of(owner)))
    assert device_resources() == before


def test_tensors_over_two_imports_share_their_bytes() -> None:
    command = (sys.executable, "-c", READER)
    environment = fake_driver_environment(FAKE_CUDA_HOST_ACCESS="1")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "[1, 2, 3, 4, 0, 0] True\n"


# Segments of a unit


def test_segments_are_mapped_as_tensors_and_unmapped_together(driver: CudaDriver, fd: int) -> None:
    before = device_resources()
    segments = CudaSegments(driver, torch.device("cpu"))
    tensors = [segments.map(SIZE, UUID, b"", fd) for _ in range(2)]
    assert [(tensor.numel(), tensor.dtype) for tensor in tensors] == [(SIZE, torch.uint8)] * 2
    driver.copy_to_device(tensors[0].data_ptr(), b"kv")
    content = bytearray(2)
    driver.copy_to_host(content, tensors[1].data_ptr())
    assert content == b"kv"
    segments.close()
    segments.close()
    assert device_resources() == before


def test_a_segment_of_another_device_is_refused_before_it_is_mapped(driver: CudaDriver, fd: int) -> None:
    before = device_resources()
    segments = CudaSegments(driver, torch.device("cpu"))
    message = f"the unit's memory is on {OTHER_UUID}, this process computes on {UUID}; CUDA_VISIBLE_DEVICES must be"
    with pytest.raises(DeviceError, match=message):
        segments.map(SIZE, OTHER_UUID, b"", fd)
    assert device_resources() == before


def test_an_error_while_segments_are_unmapped_keeps_none_of_the_others(
    driver: CudaDriver, fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    segments = CudaSegments(driver, torch.device("cpu"))
    for _ in range(2):
        segments.map(SIZE, UUID, b"", fd)
    with_both = device_resources()
    log = os.memfd_create("calls")
    monkeypatch.setenv("FAKE_CUDA_LOG", f"/proc/self/fd/{log}")
    monkeypatch.setenv("FAKE_CUDA_ERRORS", "cuMemUnmap:304")
    segments.close()
    assert os.pread(log, 4096, 0).decode().count("cuMemUnmap") == 2
    assert device_resources() == with_both, "the driver kept both"
    os.close(log)


def test_host_memory_is_pinned_from_any_thread(driver: CudaDriver) -> None:
    segments, pages = CudaSegments(driver, torch.device("cpu")), mmap.mmap(-1, 1 << 16)
    address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    with ThreadPoolExecutor(1) as threads:
        threads.submit(segments.register_host, address, 1 << 16).result()
    with pytest.raises(DeviceError, match="HOST_MEMORY_ALREADY_REGISTERED"):
        segments.register_host(address, 4096)
    driver.unregister_host(address)
