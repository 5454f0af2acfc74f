"""The control program of MPS: recorded answers of a real one, and a fake one that gives them."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvloop

from muxmesh.cuda.mps import (
    CONTROL_PROGRAM,
    MpsControl,
    MpsServer,
    ServerStatus,
    find_control_program,
    parse_code,
    parse_pids,
    parse_server,
)
from muxmesh.errors import Unavailable
from tests.support.mps import FAKE_FOLDER, FAKE_PROGRAM, RECORDED, FakeDaemon, fake_daemon, next_line


def recorded(part: str, command: str) -> str:
    answer: str = RECORDED[part][command]["out"]
    return answer


@pytest.fixture
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeDaemon]:
    with fake_daemon(tmp_path_factory.mktemp("m"), answer_within_s=60) as daemon:
        yield daemon


@pytest.mark.parametrize(
    ("part", "command", "pids"),
    [
        ("without_clients", "get_server_list", ()),
        ("with_clients", "get_server_list", (489,)),
        ("with_clients", "get_client_list 489", (495, 496)),
        ("after_clients", "get_client_list 489", ()),
        ("terminate", "get_client_list 489, the process lives", (569, 570)),
        ("terminate", "get_client_list 489, the process has exited", (569,)),
        ("kill", "get_client_list 489", (653,)),
    ],
)
def test_a_recorded_list_is_read(part: str, command: str, pids: tuple[int, ...]) -> None:
    assert parse_pids(recorded(part, command)) == pids


@pytest.mark.parametrize(
    ("part", "command", "code"),
    [
        ("terminate", "terminate_client 489 570", 0),
        ("with_clients", "terminate_client 489 999999", 1),
        ("without_clients", "terminate_client 1 2", 1),
    ],
)
def test_a_recorded_code_is_read(part: str, command: str, code: int) -> None:
    assert parse_code(recorded(part, command)) == code


@pytest.mark.parametrize(("part", "status"), [("with_clients", ServerStatus.ACTIVE), ("kill", ServerStatus.FAULT)])
def test_a_recorded_server_is_read(part: str, status: ServerStatus) -> None:
    answer = recorded(part, "get_server_status 489") + recorded(part, "get_client_list 489")
    clients = frozenset(parse_pids(recorded(part, "get_client_list 489")))
    assert parse_server(489, answer) == MpsServer(489, status, clients)


def test_a_recorded_answer_for_an_unknown_server_is_no_server() -> None:
    answer = recorded("without_clients", "get_server_status 1") + recorded("without_clients", "get_client_list 1")
    assert parse_server(1, answer) is None


@pytest.mark.parametrize("answer", ["?", 'Unknown command "get_server_list"\n', "12\nx\n"])
def test_a_list_that_is_not_understood_is_no_answer(answer: str) -> None:
    with pytest.raises(Unavailable, match="where pids are expected, one in a line"):
        parse_pids(answer)


@pytest.mark.parametrize("answer", ["", "?\n", "-1\n"])
def test_a_code_that_is_not_understood_is_no_answer(answer: str) -> None:
    with pytest.raises(Unavailable, match="where a code is expected"):
        parse_code(answer)


def test_a_status_that_is_not_understood_is_no_answer() -> None:
    with pytest.raises(Unavailable, match="'GONE' where one of INITIALIZING, ACTIVE, FAULT is expected"):
        parse_server(7, "GONE\n")


def test_the_program_is_found_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(FAKE_FOLDER), prepend=":")
    assert find_control_program() == FAKE_PROGRAM


def test_the_program_is_found_where_drivers_install_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr("muxmesh.cuda.mps.CONTROL_FOLDERS", ("/nonexistent", str(tmp_path)))
    assert find_control_program() is None
    program = tmp_path / CONTROL_PROGRAM
    program.touch(mode=0o700)
    assert find_control_program() == program


async def test_a_daemon_without_clients_has_no_server(daemon: FakeDaemon) -> None:
    assert await daemon.control.servers() == ()


async def test_clients_are_listed_until_they_are_gone(daemon: FakeDaemon) -> None:
    with daemon.client() as first, daemon.client() as second:
        (server,) = await daemon.control.servers()
        assert server == MpsServer(server.pid, ServerStatus.ACTIVE, frozenset((first.pid, second.pid)))
        first.kill()
        first.wait()
        (after,) = await daemon.control.servers()
        assert after == MpsServer(server.pid, ServerStatus.ACTIVE, frozenset((second.pid,)))


async def test_a_terminated_client_is_listed_until_its_process_exits(daemon: FakeDaemon) -> None:
    with daemon.client() as client:
        (server,) = await daemon.control.servers()
        assert await daemon.control.terminate_client(server.pid, client.pid)
        assert next_line(client) == "terminated"
        (after,) = await daemon.control.servers()
        assert after.clients == {client.pid}


async def test_a_client_that_is_unknown_is_not_terminated(daemon: FakeDaemon) -> None:
    with daemon.client() as client:
        (server,) = await daemon.control.servers()
        assert not await daemon.control.terminate_client(server.pid, 999_999)
        assert not await daemon.control.terminate_client(999_999, client.pid)


async def test_a_server_in_fault_is_active_again_when_its_clients_are_gone(daemon: FakeDaemon) -> None:
    with daemon.client():
        daemon.fail("fault")
        assert [server.status for server in await daemon.control.servers()] == [ServerStatus.FAULT]
    async with asyncio.timeout(20):
        while (await daemon.control.servers())[0].status is not ServerStatus.ACTIVE:
            pass


async def test_quit_ends_the_daemon(daemon: FakeDaemon) -> None:
    with daemon.client():
        await daemon.control.quit()
        assert daemon.process.wait() == 0
    with pytest.raises(Unavailable, match="Cannot find MPS control daemon process"):
        await daemon.control.servers()


async def test_a_daemon_that_was_killed_is_unavailable(daemon: FakeDaemon) -> None:
    daemon.process.kill()
    daemon.process.wait()
    with pytest.raises(Unavailable, match=f"no MPS daemon answers in {daemon.pipe_dir}"):
        await daemon.control.servers()


async def test_a_daemon_that_does_not_answer_in_time_is_unavailable(daemon: FakeDaemon) -> None:
    daemon.fail("silent")
    impatient = MpsControl(FAKE_PROGRAM, daemon.pipe_dir, daemon.pipe_dir, answer_within_s=0.5)
    with pytest.raises(Unavailable, match=r"did not answer 'get_server_list' in 0\.5 s"):
        await impatient.servers()


async def test_a_question_that_is_cancelled_leaves_no_process(daemon: FakeDaemon) -> None:
    daemon.fail("silent")
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    before = set(children.read_text().split())
    asking = asyncio.create_task(daemon.control.servers())
    async with asyncio.timeout(20):
        while not set(children.read_text().split()) - before:
            await asyncio.sleep(0)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    assert set(children.read_text().split()) == before


async def test_a_program_that_does_not_exist_is_unavailable(tmp_path: Path) -> None:
    control = MpsControl(tmp_path / "none", tmp_path, tmp_path)
    with pytest.raises(Unavailable, match="none cannot be started: No such file"):
        await control.servers()


def test_a_program_that_exits_without_reading_its_commands_is_no_daemon(tmp_path: Path) -> None:
    """As the real one does where no daemon listens. Services run on uvloop, which takes nothing for a closed pipe."""
    program = tmp_path / "control"
    program.write_text("#!/bin/sh\nexec <&-\necho 'Cannot find MPS control daemon process' >&2\nexit 1\n")
    program.chmod(0o700)
    control = MpsControl(program, tmp_path / "pipe", tmp_path / "log")

    async def ask_often() -> None:
        for _ in range(10):
            with pytest.raises(Unavailable, match="Cannot find MPS control daemon"):
                await control.ask(*["get_server_list"] * 100)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(ask_often())
