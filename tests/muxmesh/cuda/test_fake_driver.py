"""What only the fake driver can show: errors of every function, devices of its own, MPS without a card."""

import mmap
import os
import subprocess
import sys
from contextlib import ExitStack
from ctypes import addressof, c_char
from pathlib import Path

import pytest

from muxmesh.cuda.driver import _FUNCTIONS, _GREEN_FUNCTIONS, CudaDriver
from muxmesh.cuda.sm_groups import SmGroups
from muxmesh.errors import DeviceError
from tests.support.driver_memory import SIZE, DriverMemory
from tests.support.fake_driver import SOURCES, UUID, device_resources, fake_driver_environment, fake_driver_library
from tests.support.mps import FakeDaemon, fake_daemon


@pytest.fixture(scope="module")
def library() -> str:
    return fake_driver_library()


@pytest.fixture(scope="module")
def driver(library: str) -> CudaDriver:
    return CudaDriver(library)


def use_everything(driver: CudaDriver, library: str) -> None:
    """Calls every function of the driver, and gives back what it got, also after an error."""
    with ExitStack() as undo:
        CudaDriver(library)
        driver.num_devices()
        driver.device(0)
        driver.granularity(0)
        driver._contexts.clear()
        driver.use_primary_context(0)
        memory = DriverMemory(driver, undo)
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
        driver.green_stream(0, range(driver.sm_groups(0).count))


def test_every_function_is_used_by_the_tests_of_errors(
    driver: CudaDriver, library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CUDA_LOG", str(tmp_path / "log"))
    use_everything(driver, library)
    called = {line.split()[1] for line in (tmp_path / "log").read_text().splitlines()}
    assert {*_FUNCTIONS, *_GREEN_FUNCTIONS} - called == {
        "cuIpcCloseMemHandle",  # needs a second process
        "cuGreenCtxDestroy",  # only after an error
    }


@pytest.mark.parametrize(
    "function",
    sorted(
        {*_FUNCTIONS, *_GREEN_FUNCTIONS}
        - {"cuGetErrorName", "cuGreenCtxDestroy", "cuIpcCloseMemHandle", "cuIpcOpenMemHandle_v2"}
    ),
)
def test_an_error_of_any_function_is_reported_by_name_and_nothing_leaks(
    driver: CudaDriver, library: str, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = device_resources()
    monkeypatch.setenv("FAKE_CUDA_ERRORS", f"{function}:304")
    with pytest.raises(DeviceError, match=rf"^{function} failed: CUDA_ERROR_OPERATING_SYSTEM \(304\)$"):
        use_everything(driver, library)
    if function not in ("cuMemRelease", "cuMemUnmap", "cuMemAddressFree", "cuMemFree_v2"):
        assert device_resources() == before


def test_devices_are_chosen_by_uuid_and_counted_from_0(library: str) -> None:
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


def test_the_cpu_dies_when_it_reads_a_device_address(library: str) -> None:
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


# Green contexts


def test_a_stream_is_of_the_groups_that_it_was_asked_for(driver: CudaDriver) -> None:
    assert driver.sm_groups(0) == SmGroups(15, 8)
    assert driver.green_stream(0, (0, 3, 14)) == 1 << 0 | 1 << 3 | 1 << 14, "the fake's streams say their groups"


def test_a_green_context_whose_stream_fails_is_destroyed(
    driver: CudaDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CUDA_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("FAKE_CUDA_ERRORS", "cuGreenCtxStreamCreate:304")
    with pytest.raises(DeviceError, match="cuGreenCtxStreamCreate failed"):
        driver.green_stream(0, (0,))
    called = [line.split()[1] for line in (tmp_path / "log").read_text().splitlines()]
    assert "cuGreenCtxDestroy" in called[called.index("cuGreenCtxStreamCreate") :]


def test_a_share_without_a_group_of_sms_is_refused(library: str) -> None:
    script = "import sys; from muxmesh.cuda.driver import CudaDriver; CudaDriver(sys.argv[1]).sm_groups(0)"
    environment = fake_driver_environment(FAKE_CUDA_SMS="6")
    command = [sys.executable, "-c", script, library]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "cuDevSmResourceSplitByCount failed" in done.stderr and "too few SMs for a green context" in done.stderr


def test_a_driver_without_green_contexts_is_said_to_be_too_old(
    driver: CudaDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_GREEN_FUNCTIONS, "cuGreenCtxOfTheFuture", ())
    with pytest.raises(DeviceError, match=r"no green contexts .*cuGreenCtxOfTheFuture.* CUDA 12\.4 or later"):
        driver.sm_groups(0)


# MPS

MPS_CLIENT = """
import os, sys
from muxmesh.cuda.driver import CudaDriver
from muxmesh.errors import DeviceError
try:
    driver = CudaDriver(sys.argv[1])
    device = driver.device(0)
    print(device.num_sms, device.is_mps_client, os.getpid(), flush=True)
    sys.stdin.readline()
    driver.device(0)
    print("works")
except DeviceError as error:
    print(error)
"""


def mps_client(library: str, daemon: FakeDaemon, percent: int) -> subprocess.Popen[str]:
    share = {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(percent), "CUDA_MPS_PIPE_DIRECTORY": str(daemon.pipe_dir)}
    command, pipe = (sys.executable, "-c", MPS_CLIENT, library), subprocess.PIPE
    return subprocess.Popen(command, env=fake_driver_environment(**share), stdin=pipe, stdout=pipe, text=True)


def test_a_client_has_its_share_as_on_a_card_and_all_of_the_device_without_a_daemon(
    library: str, tmp_path: Path
) -> None:
    with fake_daemon(tmp_path) as daemon:
        for percent, sms in ((100, 132), (70, 92), (50, 66), (40, 52), (30, 38), (10, 12)):
            output, _ = mps_client(library, daemon, percent).communicate("\n")
            assert output.split()[:2] == [str(sms), "True"] and output.endswith("works\n")
    output, _ = mps_client(library, daemon, 10).communicate("\n")
    assert output.split()[:2] == ["132", "False"], "and no error, as with the real driver"


async def test_a_terminated_client_gets_an_error_from_every_call(library: str, tmp_path: Path) -> None:
    with fake_daemon(tmp_path) as daemon, mps_client(library, daemon, 50) as client:
        assert client.stdout is not None
        pid = int(client.stdout.readline().split()[2])
        (server,) = await daemon.control.servers()
        assert server.clients == {pid}
        assert await daemon.control.terminate_client(server.pid, pid)
        output, _ = client.communicate("\n")
        assert output == "cuDeviceGet failed: CUDA_ERROR_MPS_CLIENT_TERMINATED (810)\n"


def test_a_server_in_fault_takes_no_client(library: str, tmp_path: Path) -> None:
    with fake_daemon(tmp_path) as daemon, mps_client(library, daemon, 50) as first:
        assert first.stdout is not None
        first.stdout.readline()
        daemon.fail("fault")
        output, _ = mps_client(library, daemon, 50).communicate("\n")
        assert output == "cuInit failed: CUDA_ERROR_MPS_SERVER_NOT_READY (807)\n"
        first.communicate("\n")
    with fake_daemon(tmp_path) as daemon:
        output, _ = mps_client(library, daemon, 50).communicate("\n")
        assert output.startswith("66 True")
