"""The proof of a worker's share: the comparison as a table, then workers of the fake driver under a fake daemon."""

import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvstore.mps_fence import MpsFence
from kvstore.share_proof import ConfiguredShare, ReportedShare, ShareProver, share_problem
from muxmesh.background_task import background
from muxmesh.clock import SystemClock
from muxmesh.types import Role
from tests.kvstore.test_attach_server import Server, line_of
from tests.kvstore.test_fence import fail
from tests.support.fake_driver import NUM_SMS, fake_driver_environment
from tests.support.mps import FakeDaemon, fake_daemon

PIPE_DIR = "/run/mps-5f4df884"


@pytest.mark.parametrize(
    ("percent", "num_sms"), [(100, 132), (50, 66), (40, 52), (30, 38), (10, 12), (50, 40), (1, 0), (99, 130)]
)
def test_a_client_within_its_share_is_accepted(percent: int, num_sms: int) -> None:
    """The pairs up to 10 % are those of an H200, which rounds down to even numbers."""
    configured = ConfiguredShare(percent, NUM_SMS, PIPE_DIR)
    assert share_problem(ReportedShare(num_sms, is_mps_client=True), configured, is_listed=True) == ""


@pytest.mark.parametrize(
    ("reported", "percent", "pipe_dir", "is_listed", "problem"),
    [
        (
            ReportedShare(132, is_mps_client=False),
            40,
            PIPE_DIR,
            False,
            "it is no client of MPS, so nothing limits it to 40 %: a daemon has to listen in /run/mps-5f4df884, which "
            "its CUDA_MPS_PIPE_DIRECTORY has to name",
        ),
        (
            ReportedShare(132, is_mps_client=False),
            100,
            PIPE_DIR,
            True,
            "it is no client of MPS, so nothing limits it to 100 %: a daemon has to listen in /run/mps-5f4df884, which "
            "its CUDA_MPS_PIPE_DIRECTORY has to name",
        ),
        (
            ReportedShare(132, is_mps_client=True),
            100,
            PIPE_DIR,
            False,
            "the MPS daemon in /run/mps-5f4df884 does not list its process: it is a client of another daemon, or in "
            "another pid namespace than the daemon",
        ),
        (
            ReportedShare(132, is_mps_client=True),
            40,
            PIPE_DIR,
            True,
            "it may use 132 of 132 SMs; its compute_share of 40 % allows 52: CUDA_MPS_ACTIVE_THREAD_PERCENTAGE has to "
            "be 40 when it starts",
        ),
        (
            ReportedShare(54, is_mps_client=True),
            40,
            PIPE_DIR,
            True,
            "it may use 54 of 132 SMs; its compute_share of 40 % allows 52: CUDA_MPS_ACTIVE_THREAD_PERCENTAGE has to "
            "be 40 when it starts",
        ),
        (
            ReportedShare(132, is_mps_client=True),
            100,
            "",
            False,
            "it is a client of an MPS daemon, but the unit does not use MPS: its CUDA_MPS_PIPE_DIRECTORY has to be one "
            "in which no daemon listens",
        ),
        (ReportedShare(132, is_mps_client=False), 40, "", False, ""),
    ],
)
def test_a_worker_that_is_not_limited_as_configured_is_told_what_would_be_right(
    reported: ReportedShare, percent: int, pipe_dir: str, is_listed: bool, problem: str
) -> None:
    assert share_problem(reported, ConfiguredShare(percent, NUM_SMS, pipe_dir), is_listed) == problem


@pytest.mark.parametrize(
    "message", [{}, {"num_sms": "66", "mps": True}, {"num_sms": True, "mps": True}, {"num_sms": 1}]
)
def test_a_report_that_is_not_understood_is_refused(message: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="num_sms must be an integer and mps a boolean"):
        ReportedShare.parse(message)


# Workers of the fake driver

WORKER = """
import asyncio, sys, time
from pathlib import Path
from muxmesh.cuda.driver import CudaDriver
from muxmesh.types import Role
from worker.attachment import attach
async def main():
    device = CudaDriver().device(0)
    attachment = await attach(Path(sys.argv[1]), Role.DECODE, "m", "unix:x")
    if sys.argv[2] == "proves":
        await attachment.prove_share(device.num_sms, device.is_mps_client)
    attachment.set_ready(True)
    print("ready", device.num_sms, flush=True)
    while True:
        attachment.beat()
        await asyncio.sleep(0.01)
try:
    asyncio.run(main())
except Exception as error:
    print(error, flush=True)
    raise SystemExit(1)
"""
"""A worker whose driver is the fake one. Prints that it is ready, or why it was refused."""

SHARE = 40


@pytest.fixture
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeDaemon]:
    with fake_daemon(tmp_path_factory.mktemp("m"), answer_within_s=60) as daemon:
        yield daemon


@asynccontextmanager
async def unit_under_mps(folder: Path, daemon: FakeDaemon) -> AsyncIterator[Server]:
    """A unit whose workers may have `SHARE` of the fake device."""

    def end_group(reason: str, device_has_failed: bool) -> None:
        server.attach.end_group(reason, device_has_failed)

    fence = MpsFence(daemon.control, SystemClock(), end_group, fail, release_within_s=60, poll_every_s=0.05)
    prover = ShareProver(lambda role, model: SHARE, NUM_SMS, str(daemon.pipe_dir), fence.is_client)
    server = Server(folder / "a.sock", fence, prover=prover)
    async with background(fence.run(), "fence", fail):
        yield server
    server.close()
    fence.close()


@contextmanager
def worker_process(
    server: Server, daemon: FakeDaemon, share: int | None, proves: str = "proves", **change: str
) -> Iterator[subprocess.Popen[bytes]]:
    settings = {} if share is None else {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(share)}
    environment = fake_driver_environment(**daemon.control.environment, **settings) | change
    with subprocess.Popen(
        (sys.executable, "-c", WORKER, str(server.path), proves), env=environment, stdout=subprocess.PIPE
    ) as process:
        try:
            yield process
        finally:
            process.kill()


async def test_a_worker_at_its_share_becomes_ready(tmp_path: Path, daemon: FakeDaemon) -> None:
    async with unit_under_mps(tmp_path, daemon) as server:
        with worker_process(server, daemon, SHARE) as process:
            assert await line_of(process) == b"ready 52\n"
            await server.until_ready(1)


@pytest.mark.parametrize(
    ("share", "change", "reason"),
    [
        (SHARE, {"CUDA_MPS_PIPE_DIRECTORY": "/nonexistent"}, "it is no client of MPS, so nothing limits it to 40 %"),
        (None, {}, "it may use 132 of 132 SMs; its compute_share of 40 % allows 52"),
        (60, {}, "it may use 78 of 132 SMs; its compute_share of 40 % allows 52"),
    ],
)
async def test_a_worker_that_is_unlimited_or_at_the_wrong_share_is_refused(
    tmp_path: Path,
    daemon: FakeDaemon,
    share: int | None,
    change: dict[str, str],
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with unit_under_mps(tmp_path, daemon) as server:
        with worker_process(server, daemon, share, **change) as process:
            said = (await line_of(process)).decode()
            assert said.startswith("the unit refused decode-m#")
            assert reason in said
            await server.until_attached(0)
            assert process.wait() == 1
    assert any(record.levelname == "ERROR" and reason in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(("how", "reason"), [("other_pids", "does not list its process"), ("nonsense", "answered '?")])
async def test_a_worker_is_refused_while_the_daemon_does_not_confirm_it(
    tmp_path: Path, daemon: FakeDaemon, how: str, reason: str
) -> None:
    daemon.fail(how)
    async with unit_under_mps(tmp_path, daemon) as server:
        with worker_process(server, daemon, SHARE) as process:
            assert reason in (await line_of(process)).decode()
            assert process.wait() == 1
            daemon.recover(how)
            await server.until_attached(0)


async def test_a_worker_whose_daemon_was_killed_is_refused(tmp_path: Path, daemon: FakeDaemon) -> None:
    """The worker runs without a limit and without an error of the driver."""
    daemon.process.kill()
    daemon.process.wait()
    async with unit_under_mps(tmp_path, daemon) as server:
        with worker_process(server, daemon, SHARE) as process:
            said = (await line_of(process)).decode()
            assert "no MPS daemon answers in" in said
            assert process.wait() == 1
        assert server.unit.ready_workers(Role.DECODE, "m") == []


async def test_a_worker_that_proves_nothing_is_never_ready(
    tmp_path: Path, daemon: FakeDaemon, caplog: pytest.LogCaptureFixture
) -> None:
    async with unit_under_mps(tmp_path, daemon) as server:
        with worker_process(server, daemon, SHARE, proves="proves nothing") as process:
            assert await line_of(process) == b"ready 52\n"
            await server.until(lambda: "it has not proved its share of the GPU" in caplog.text)
            assert server.unit.ready_workers(Role.DECODE, "m") == []


async def test_a_fault_ends_all_workers_and_newcomers_are_ready_in_the_same_pool(
    tmp_path: Path, daemon: FakeDaemon
) -> None:
    async with unit_under_mps(tmp_path, daemon) as server:
        with worker_process(server, daemon, SHARE) as first, worker_process(server, daemon, SHARE) as second:
            await server.until_ready(2)
            daemon.fail("fault")
            await server.until_attached(0)
            assert [first.wait(), second.wait()] == [-signal.SIGKILL] * 2
        with worker_process(server, daemon, SHARE):
            await server.until_ready(1)
