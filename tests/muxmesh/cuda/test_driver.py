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
from pathlib import Path
from typing import Any

import pytest
from cuda.bindings import driver as cuda

from muxmesh.cuda.driver import _FUNCTIONS, CudaDriver
from muxmesh.errors import DeviceError
from tests.support.fake_driver import SOURCES, UUID, device_resources, fake_driver_environment

SIZE = 4 << 20

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


class Memory:
    """An allocation of `SIZE` bytes with a mapping, freed with the block."""

    def __init__(self, driver: CudaDriver, undo: ExitStack) -> None:
        self.driver = driver
        self.handle = driver.create(0, SIZE)
        undo.callback(driver.release, self.handle)
        self.address = driver.map(self.handle, SIZE, 0)
        undo.callback(driver.unmap, self.address, SIZE)

    def read(self, offset: int, num_bytes: int) -> bytes:
        content = bytearray(num_bytes)
        self.driver.copy_to_host(content, self.address + offset)
        return bytes(content)


@pytest.fixture
def undo() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def memory(in_context: CudaDriver, undo: ExitStack) -> Memory:
    return Memory(in_context, undo)


# Devices


def test_a_device_is_described_with_its_uuid_and_what_it_can_share(driver: CudaDriver) -> None:
    device = driver.device(0)
    assert driver.num_devices() >= 1 and device.index == 0
    assert re.fullmatch(r"GPU(-[0-9a-f]{4,12}){5}", device.uuid)
    assert device.num_sms > 0 and device.total_bytes >= 1 << 30 and device.compute_capability >= (7, 0)
    assert device.has_vmm and device.has_posix_fd and not device.is_mps_client


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


def test_new_memory_reads_zeros_and_keeps_what_is_written(memory: Memory) -> None:
    assert memory.read(SIZE - 16, 16) == bytes(16)
    memory.driver.copy_to_device(memory.address + 5, b"some bytes")
    assert memory.read(4, 12) == b"\0some bytes\0"
    memory.driver.copy_to_device(memory.address, memoryview(bytearray(b"ab")))
    memory.driver.copy_to_device(memory.address, b"")
    memory.driver.copy_to_device(memory.address, bytearray())
    assert memory.read(0, 4) == b"ab\0\0" and memory.read(0, 0) == b""


def test_all_mappings_of_exported_memory_are_the_same_bytes(memory: Memory, undo: ExitStack) -> None:
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


REFUSALS: dict[str, tuple[Callable[[CudaDriver, Memory], object], str]] = {
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
def test_the_driver_refuses_and_the_error_says_why(memory: Memory, what: str) -> None:
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


def test_a_copy_needs_a_context_in_its_thread(memory: Memory) -> None:
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


def test_another_process_writes_into_memory_whose_descriptor_it_got(memory: Memory, library: str) -> None:
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


# NVIDIA's own bindings as a second caller


def checked(answer: tuple[Any, ...]) -> Any:
    """What a call of the bindings returned beside its error code."""
    assert answer[0] == cuda.CUresult.CUDA_SUCCESS, answer[0]
    return answer[1] if len(answer) == 2 else answer[1:]


def bindings_properties() -> Any:
    properties = cuda.CUmemAllocationProp()
    properties.type = cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.requestedHandleTypes = cuda.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
    properties.location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    properties.location.id = 0
    return properties


def test_the_bindings_see_the_same_device(driver: CudaDriver) -> None:
    checked(cuda.cuInit(0))
    device = driver.device(0)
    assert checked(cuda.cuDeviceGetCount()) == driver.num_devices()
    handle = checked(cuda.cuDeviceGet(0))
    assert checked(cuda.cuDeviceGetUuid(handle)).bytes.hex() == device.uuid.removeprefix("GPU-").replace("-", "")
    assert checked(cuda.cuDeviceGetName(256, handle)).split(b"\0")[0].decode() == device.name
    assert checked(cuda.cuDeviceTotalMem(handle)) == device.total_bytes
    multiprocessors = cuda.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
    assert checked(cuda.cuDeviceGetAttribute(multiprocessors, handle)) == device.num_sms
    granularity = checked(
        cuda.cuMemGetAllocationGranularity(bindings_properties(), cuda.CUmemAllocationGranularity_flags(0))
    )
    assert granularity == driver.granularity(0)


def test_memory_of_the_bindings_is_imported(in_context: CudaDriver, undo: ExitStack) -> None:
    kind = cuda.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
    handle = checked(cuda.cuMemCreate(SIZE, bindings_properties(), 0))
    fd = checked(cuda.cuMemExportToShareableHandle(handle, kind, 0))
    imported = in_context.import_fd(int(fd))
    os.close(int(fd))
    address = in_context.map(imported, SIZE, 0)
    undo.callback(in_context.unmap, address, SIZE)
    in_context.release(imported)
    checked(cuda.cuMemRelease(handle))
    checked(cuda.cuMemcpyHtoD(address, b"by the bindings", 15))
    content = bytearray(15)
    in_context.copy_to_host(content, address)
    assert content == b"by the bindings"


def test_the_bindings_get_the_same_errors(driver: CudaDriver, memory: Memory) -> None:
    def code(answer: tuple[Any, ...]) -> int:
        return int(answer[0])

    kind = cuda.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
    address = checked(cuda.cuMemAddressReserve(SIZE, 0, 0, 0))
    assert code(cuda.cuMemMap(address, SIZE // 2, 0, memory.handle, 0)) in (1, 801)
    assert code(cuda.cuMemAddressFree(address, SIZE)) == 0
    assert code(cuda.cuMemCreate(12345, bindings_properties(), 0)) == 1
    assert code(cuda.cuMemCreate(1 << 42, bindings_properties(), 0)) == 2
    assert code(cuda.cuMemImportFromShareableHandle(999, kind)) == 999
    assert code(cuda.cuIpcGetMemHandle(memory.address)) == 1
    assert code(cuda.cuDeviceGet(driver.num_devices())) == 101


def test_a_mapping_without_access_cannot_be_copied(memory: Memory) -> None:
    address = checked(cuda.cuMemAddressReserve(SIZE, 0, 0, 0))
    checked(cuda.cuMemMap(address, SIZE, 0, memory.handle, 0))
    assert int(cuda.cuMemcpyHtoD(address, b"x", 1)[0]) == 1
    checked(cuda.cuMemUnmap(address, SIZE))
    checked(cuda.cuMemAddressFree(address, SIZE))


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


# What only the fake can show


def use_everything(driver: CudaDriver, library: str) -> None:
    """Calls every function of the driver, and gives back what it got, also after an error."""
    with ExitStack() as undo:
        CudaDriver(library)
        driver.num_devices()
        driver.device(0)
        driver.granularity(0)
        driver._contexts.clear()
        driver.use_primary_context(0)
        memory = Memory(driver, undo)
        fd = driver.export_fd(memory.handle)
        undo.callback(os.close, fd)
        driver.release(driver.import_fd(fd))
        driver.copy_to_device(memory.address, memory.read(0, 8))
        plain = driver.allocate(SIZE)
        undo.callback(driver.free, plain)
        assert driver.allocated_bytes(plain) >= SIZE
        handle = driver.ipc_handle(plain)
        with pytest.raises(DeviceError, match=r"\(201\)"):
            driver.open_ipc_handle(handle)
        pages = mmap.mmap(-1, 4096)
        address = addressof(c_char.from_buffer(pages))
        driver.register_host(address, 4096)
        driver.unregister_host(address)


def test_every_function_is_used_by_the_tests_of_errors(
    driver: CudaDriver, library: str, is_fake: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_fake:
        pytest.skip("the real driver logs no calls")
    monkeypatch.setenv("FAKE_CUDA_LOG", str(tmp_path / "log"))
    use_everything(driver, library)
    called = {line.split()[1] for line in (tmp_path / "log").read_text().splitlines()}
    assert set(_FUNCTIONS) - called == {"cuIpcCloseMemHandle"}, "which needs a second process"


@pytest.mark.parametrize(
    "function", sorted(set(_FUNCTIONS) - {"cuGetErrorName", "cuIpcCloseMemHandle", "cuIpcOpenMemHandle_v2"})
)
def test_an_error_of_any_function_is_reported_by_name_and_nothing_leaks(
    driver: CudaDriver, library: str, is_fake: bool, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_fake:
        pytest.skip("the real driver has no errors on demand")
    before = device_resources()
    monkeypatch.setenv("FAKE_CUDA_ERRORS", f"{function}:304")
    with pytest.raises(DeviceError, match=rf"^{function} failed: CUDA_ERROR_OPERATING_SYSTEM \(304\)$"):
        use_everything(driver, library)
    if function not in ("cuMemRelease", "cuMemUnmap", "cuMemAddressFree", "cuMemFree_v2"):
        assert device_resources() == before


def test_devices_are_chosen_by_uuid_and_counted_from_0(library: str, is_fake: bool) -> None:
    if not is_fake:
        pytest.skip("the real machine has the devices that it has")
    others = "GPU-00000000-0000-4000-8000-000000000007"
    script = "import sys; from muxmesh.cuda.driver import CudaDriver; d = CudaDriver(sys.argv[1]); " + (
        "print(d.num_devices(), d.device(0).uuid)"
    )

    def output(visible: str) -> str:
        environment = fake_driver_environment(FAKE_CUDA_UUIDS=f"{others},{UUID}", CUDA_VISIBLE_DEVICES=visible)
        command = [sys.executable, "-c", script, library]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return done.stdout.strip() or done.stderr.splitlines()[-1]

    assert output(UUID) == f"1 {UUID}"
    assert output(f"{UUID},{others}") == f"2 {UUID}"
    assert output("1,0") == f"2 {UUID}"
    assert "cuInit failed: CUDA_ERROR_NO_DEVICE (100): no device is visible" in output("GPU-12345678")


def test_the_cpu_dies_when_it_reads_a_device_address(memory: Memory, library: str, is_fake: bool) -> None:
    script = """
import ctypes, sys
from muxmesh.cuda.driver import CudaDriver
driver = CudaDriver(sys.argv[1])
driver.use_primary_context(0)
handle = driver.create(0, 2 << 20)
address = driver.map(handle, 2 << 20, 0)
driver.copy_to_device(address, b"seen")
print(ctypes.string_at(address, 4).decode(), flush=True)
"""
    command = [sys.executable, "-c", script, library]
    dead = subprocess.run(command, capture_output=True, text=True, check=False)
    assert dead.returncode < 0 and dead.stdout == ""
    if is_fake:
        environment = fake_driver_environment(FAKE_CUDA_HOST_ACCESS="1")
        seen = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert seen.stdout == "seen\n"


def test_the_prototypes_of_the_fake_are_those_of_the_cuda_toolkit(tmp_path: Path) -> None:
    include = Path("/usr/local/cuda/include")
    if not (include / "cuda.h").exists():
        pytest.skip("this machine has no CUDA toolkit")
    for source in SOURCES.glob("*.c"):
        command = [
            "cc",
            "-std=gnu11",
            "-Wall",
            "-Werror",
            "-DWITH_CUDA_H",
            f"-I{include}",
            "-fsyntax-only",
            str(source),
        ]
        subprocess.run(command, check=True)
