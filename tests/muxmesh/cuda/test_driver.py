"""The contract of the driver seam: on the fake driver here, and unchanged on a GPU (MUXMESH_TEST_LIBCUDA)."""

import mmap
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from ctypes import addressof, c_char

import pytest

from muxmesh.cuda.driver import CudaDriver
from muxmesh.errors import DeviceError
from tests.support.driver_memory import SIZE, DriverMemory
from tests.support.fake_driver import device_resources

PEER = """
import os, socket, sys
from muxmesh.cuda.driver import CudaDriver
library, way, size, pattern = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4].encode()
driver = CudaDriver(library)
driver.use_primary_context(0)
if way == "fd":
    connection = socket.socket(fileno=int(sys.argv[5]))
    _, (fd,), _, _ = socket.recv_fds(connection, 1, 1)
    handle = driver.import_fd(fd)
    os.close(fd)
    address = driver.map(handle, size, 0)
    driver.release(handle)
else:
    address = driver.open_ipc_handle(bytes.fromhex(sys.argv[5]))
    assert driver.allocated_bytes(address) >= size
seen = bytearray(8)
driver.copy_to_host(seen, address)
print(bytes(seen).hex(), flush=True)
driver.copy_to_device(address + size - 8, pattern)
print("written", flush=True)
sys.stdin.readline()
driver.copy_to_host(seen, address)
print(bytes(seen).hex(), flush=True)
"""
"""Reads the first 8 bytes of memory of another process, writes the last 8, and reads again after a line of input."""

OWNER = """
import socket, sys
from muxmesh.cuda.driver import CudaDriver
driver = CudaDriver(sys.argv[1])
handle = driver.create(0, int(sys.argv[2]))
socket.send_fds(socket.socket(fileno=int(sys.argv[3])), [b"x"], [driver.export_fd(handle)])
sys.stdin.readline()
"""
"""Allocates memory, as kvstore does: without a context."""


@contextmanager
def python_process(script: str, *arguments: str, fd: int | None = None) -> Iterator[subprocess.Popen[str]]:
    """A further process with the library. It inherits ``fd``, whose number is its last argument."""
    command = [sys.executable, "-c", script, *arguments, *([] if fd is None else [str(fd)])]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, pass_fds=() if fd is None else (fd,)) as process:
        try:
            yield process
        finally:
            process.kill()


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def continue_(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


# Devices


def test_a_device_is_described_with_its_uuid_and_what_it_can_share(driver: CudaDriver) -> None:
    device = driver.device(0)
    assert driver.num_devices() >= 1 and device.index == 0
    assert re.fullmatch(r"GPU(-[0-9a-f]{4,12}){5}", device.uuid)
    assert device.num_sms > 0 and device.total_bytes >= 1 << 30 and device.compute_capability >= (7, 0)
    assert device.has_vmm and device.has_posix_fd and not device.is_mps_client


def test_green_streams_are_of_groups_of_the_devices_sms(driver: CudaDriver) -> None:
    groups, num_sms = driver.sm_groups(0), driver.device(0).num_sms
    assert groups.num_sms >= 8 and num_sms // 2 < groups.count * groups.num_sms <= num_sms
    assert driver.green_stream(0, (0,)) != driver.green_stream(0, range(1, groups.count))


def test_the_fake_device_says_that_it_is_fake(driver: CudaDriver, is_fake: bool) -> None:
    assert ("fake" in driver.device(0).name) is is_fake


def test_a_device_that_is_not_visible_is_refused(driver: CudaDriver) -> None:
    with pytest.raises(DeviceError, match=r"cuDeviceGet failed: CUDA_ERROR_INVALID_DEVICE \(101\): CUDA_VISIBLE_DEV"):
        driver.device(driver.num_devices())


def test_a_library_that_is_missing_is_named() -> None:
    with pytest.raises(DeviceError, match=r"cannot load libnone\.so\.1: .*a unit on CUDA needs NVIDIA's driver"):
        CudaDriver("libnone.so.1")


def test_a_library_without_the_functions_is_refused() -> None:
    with pytest.raises(DeviceError, match=r"libc\.so\.6 lacks a function: .*cuInit"):
        CudaDriver("libc.so.6")


def test_a_child_that_is_forked_after_cuda_was_used_cannot_use_it(library: str) -> None:
    script = """
import os, sys
from muxmesh.cuda.driver import CudaDriver
driver = CudaDriver(sys.argv[1])
if os.fork() == 0:
    try:
        driver.device(0)
    except Exception as error:
        print(error, flush=True)
    os._exit(0)
os.wait()
"""
    with python_process(script, library) as process:
        assert "CUDA_ERROR_NOT_INITIALIZED (3): a process that has used CUDA cannot" in line_of(process)


# Virtual memory management


def test_new_memory_reads_zeros_and_keeps_what_is_written(memory: DriverMemory) -> None:
    assert memory.read(SIZE - 16, 16) == bytes(16)
    memory.driver.copy_to_device(memory.address + 5, b"some bytes")
    assert memory.read(4, 12) == b"\0some bytes\0"
    memory.driver.copy_to_device(memory.address, memoryview(bytearray(b"ab")))
    memory.driver.copy_to_device(memory.address, b"")
    memory.driver.copy_to_device(memory.address, bytearray())
    assert memory.read(0, 4) == b"ab\0\0" and memory.read(0, 0) == b""


def test_all_mappings_of_exported_memory_are_the_same_bytes(memory: DriverMemory, undo: ExitStack) -> None:
    driver = memory.driver
    fds = [driver.export_fd(memory.handle) for _ in range(2)]
    handles = [driver.import_fd(fd) for fd in fds]
    for fd in fds:
        assert not os.get_inheritable(fd)
        os.close(fd)
    addresses = [driver.map(handle, SIZE, 0) for handle in handles]
    for handle, address in zip(handles, addresses, strict=True):
        driver.release(handle)
        undo.callback(driver.unmap, address, SIZE)
    driver.copy_to_device(addresses[0], b"first")
    driver.copy_to_device(addresses[1] + SIZE - 4, b"last")
    assert memory.read(0, 5) == b"first" and memory.read(SIZE - 4, 4) == b"last"


def test_memory_lives_until_its_last_mapping_is_gone(in_context: CudaDriver) -> None:
    driver = in_context
    handle = driver.create(0, SIZE)
    address = driver.map(handle, SIZE, 0)
    driver.release(handle)
    driver.copy_to_device(address, b"still here")
    content = bytearray(10)
    driver.copy_to_host(content, address)
    assert content == b"still here"
    driver.unmap(address, SIZE)
    with pytest.raises(DeviceError, match=r"cuMemcpyDtoH_v2 failed: CUDA_ERROR_INVALID_VALUE"):
        driver.copy_to_host(content, address)


REFUSALS: dict[str, tuple[Callable[[CudaDriver, DriverMemory], object], str]] = {
    "a size that is no multiple of the granularity": (
        lambda driver, _: driver.create(0, 12345),
        r"cuMemCreate failed: CUDA_ERROR_INVALID_VALUE \(1\): the size has to be a multiple of the granularity",
    ),
    "more memory than the device has": (
        lambda driver, _: driver.create(0, 1 << 42),
        r"cuMemCreate failed: CUDA_ERROR_OUT_OF_MEMORY \(2\): the device has too little free memory",
    ),
    "a mapping of half of it": (
        lambda driver, memory: driver.map(memory.handle, SIZE // 2, 0),
        r"cuMemMap failed: CUDA_ERROR_NOT_SUPPORTED \(801\): the size differs from that of the allocation",
    ),
    "a mapping larger than it": (
        lambda driver, memory: driver.map(memory.handle, 2 * SIZE, 0),
        r"cuMemMap failed: CUDA_ERROR_NOT_SUPPORTED \(801\): the size differs from that of the allocation",
    ),
    "an import of a descriptor that is not open": (
        lambda driver, _: driver.import_fd(999),
        r"cuMemImportFromShareableHandle failed: CUDA_ERROR_UNKNOWN \(999\): the file descriptor is not of device",
    ),
    "an IPC handle of memory that was mapped": (
        lambda driver, memory: driver.ipc_handle(memory.address),
        r"cuIpcGetMemHandle failed: CUDA_ERROR_INVALID_VALUE \(1\): only memory that `allocate` returned",
    ),
    "an IPC handle of another length": (
        lambda driver, _: driver.open_ipc_handle(b"12"),
        "an IPC handle has 64 bytes, not 2",
    ),
}


@pytest.mark.parametrize("what", list(REFUSALS))
def test_the_driver_refuses_and_the_error_says_why(memory: DriverMemory, what: str) -> None:
    call, message = REFUSALS[what]
    before = device_resources()
    with pytest.raises(DeviceError, match=message):
        call(memory.driver, memory)
    assert device_resources() == before


def test_a_descriptor_of_host_memory_is_not_imported(driver: CudaDriver, undo: ExitStack) -> None:
    fd = os.memfd_create("host")
    undo.callback(os.close, fd)
    with pytest.raises(DeviceError, match=r"CUDA_ERROR_UNKNOWN \(999\): the file descriptor is not of device memory"):
        driver.import_fd(fd)


def test_a_handle_is_released_once(driver: CudaDriver) -> None:
    handle = driver.create(0, SIZE)
    driver.release(handle)
    with pytest.raises(DeviceError, match=r"cuMemRelease failed: CUDA_ERROR_INVALID_VALUE \(1\)"):
        driver.release(handle)


def test_a_copy_needs_a_context_in_its_thread(memory: DriverMemory) -> None:
    errors: list[str] = []

    def copy() -> None:
        try:
            memory.driver.copy_to_device(memory.address, b"x")
        except DeviceError as error:
            errors.append(str(error))
        memory.driver.use_primary_context(0)
        memory.driver.copy_to_device(memory.address, b"y")

    thread = threading.Thread(target=copy)
    thread.start()
    thread.join()
    assert errors == ["cuMemcpyHtoD_v2 failed: CUDA_ERROR_INVALID_CONTEXT (201)"]
    assert memory.read(0, 1) == b"y"


# Other processes


def test_another_process_writes_into_memory_whose_descriptor_it_got(memory: DriverMemory, library: str) -> None:
    memory.driver.copy_to_device(memory.address, b"from-own")
    ours, theirs = socket.socketpair()
    with ours, theirs, python_process(PEER, library, "fd", str(SIZE), "response", fd=theirs.fileno()) as peer:
        fd = memory.driver.export_fd(memory.handle)
        socket.send_fds(ours, [b"x"], [fd])
        os.close(fd)
        assert bytes.fromhex(line_of(peer)) == b"from-own"
        assert line_of(peer) == "written"
        assert memory.read(SIZE - 8, 8) == b"response"
        peer.kill()
        peer.wait()
    assert memory.read(SIZE - 8, 8) == b"response"
    memory.driver.copy_to_device(memory.address, b"still writable")
    assert memory.read(0, 14) == b"still writable"


def test_mapped_memory_survives_the_process_that_allocated_it(
    in_context: CudaDriver, library: str, undo: ExitStack
) -> None:
    driver = in_context
    ours, theirs = socket.socketpair()
    with ours, theirs, python_process(OWNER, library, str(SIZE), fd=theirs.fileno()) as owner:
        _, (fd,), _, _ = socket.recv_fds(ours, 1, 1)
        handle = driver.import_fd(fd)
        os.close(fd)
        address = driver.map(handle, SIZE, 0)
        undo.callback(driver.unmap, address, SIZE)
        driver.release(handle)
        driver.copy_to_device(address, b"content")
        owner.kill()
        owner.wait()
    content = bytearray(7)
    driver.copy_to_host(content, address)
    assert content == b"content"
    driver.copy_to_device(address + SIZE - 4, b"last")


def test_the_size_of_an_allocation_is_known_from_its_address(in_context: CudaDriver, undo: ExitStack) -> None:
    address = in_context.allocate(SIZE)
    undo.callback(in_context.free, address)
    assert in_context.allocated_bytes(address) == SIZE
    assert in_context.allocated_bytes(address + 5) == SIZE - 5
    with pytest.raises(DeviceError, match="cuMemGetAddressRange_v2 failed: "):
        in_context.allocated_bytes(4096)


def test_another_process_opens_an_ipc_handle(in_context: CudaDriver, library: str, undo: ExitStack) -> None:
    driver = in_context
    address = driver.allocate(SIZE)
    undo.callback(driver.free, address)
    driver.copy_to_device(address, b"from-own")
    handle = driver.ipc_handle(address)
    with python_process(PEER, library, "ipc", str(SIZE), "response", handle.hex()) as peer:
        assert bytes.fromhex(line_of(peer)) == b"from-own"
        assert line_of(peer) == "written"
        content = bytearray(8)
        driver.copy_to_host(content, address + SIZE - 8)
        assert content == b"response"
        driver.copy_to_device(address, b"anew    ")
        continue_(peer)
        assert bytes.fromhex(line_of(peer)) == b"anew    "


def test_a_process_cannot_open_a_handle_of_its_own(in_context: CudaDriver, undo: ExitStack) -> None:
    address = in_context.allocate(SIZE)
    undo.callback(in_context.free, address)
    with pytest.raises(DeviceError, match=r"CUDA_ERROR_INVALID_CONTEXT \(201\): a process cannot open a handle of its"):
        in_context.open_ipc_handle(in_context.ipc_handle(address))


# Host memory


def test_host_memory_is_registered_once_at_a_time(in_context: CudaDriver) -> None:
    pages = mmap.mmap(-1, 1 << 20)
    address = addressof(c_char.from_buffer(pages))
    for _ in range(2):
        in_context.register_host(address, 1 << 20)
        with pytest.raises(DeviceError, match=r"CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED \(712\)"):
            in_context.register_host(address, 1 << 20)
        in_context.unregister_host(address)
    with pytest.raises(DeviceError, match=r"CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED \(713\)"):
        in_context.unregister_host(address)
