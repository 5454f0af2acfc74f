import asyncio
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest

from muxmesh.client import MeshClient, SyncMeshClient
from muxmesh.errors import InvalidRequest, ModelNotFound, Overloaded, RequestAborted
from tests.support.fake_mesh import FakeMesh, fake_mesh_in_thread, output


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[FakeMesh]:
    with fake_mesh_in_thread(tmp_path) as fake:
        yield fake


@pytest.fixture
def client(mesh: FakeMesh) -> Iterator[SyncMeshClient]:
    with SyncMeshClient(mesh.address) as connected:
        yield connected


def client_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "mesh client"]


def begin_endless_stream(mesh: FakeMesh) -> None:
    mesh.script = [*output("ab")[:1], asyncio.Event()]


async def test_the_sync_client_returns_what_the_async_client_returns(mesh: FakeMesh, client: SyncMeshClient) -> None:
    mesh.script = output("abc", "xy")
    async with MeshClient(mesh.address) as reference:
        assert client.generate_many("x", num_sequences=2) == await reference.generate_many("x", num_sequences=2)
        assert list(client.stream("x")) == [delta async for delta in reference.stream("x")]
        assert client.list_models() == await reference.list_models()
        assert client.status() == await reference.status()
        mesh.script = output("z")
        assert client.generate("x") == await reference.generate("x")


def test_options_reach_the_request(mesh: FakeMesh, client: SyncMeshClient) -> None:
    client.generate("x", model="m", seed=5, stop_strings="end")
    (request,) = mesh.requests
    assert (request.sampling.seed, list(request.stopping.stop_strings)) == (5, ["end"])


def test_errors_are_those_of_the_async_client(mesh: FakeMesh, client: SyncMeshClient) -> None:
    with pytest.raises(ModelNotFound, match="'other'"):
        client.generate("x", model="other")
    with pytest.raises(InvalidRequest, match=r"^seed: is -1"):
        client.stream("x", seed=-1)
    mesh.unary_error = Overloaded("full", 2.5)
    with pytest.raises(Overloaded, match="full") as caught:
        client.list_models()
    assert caught.value.retry_after_s == 2.5


def test_a_stream_sends_nothing_before_its_first_delta_is_requested(mesh: FakeMesh, client: SyncMeshClient) -> None:
    stream = iter(client.stream("x", model="m"))
    client.generate("y", model="m")
    assert [request.text for request in mesh.requests] == ["y"]
    assert next(stream).text == "a"
    assert [request.text for request in mesh.requests] == ["y", "x"]


def test_leaving_a_loop_over_a_stream_aborts_the_request(mesh: FakeMesh, client: SyncMeshClient) -> None:
    begin_endless_stream(mesh)
    for delta in client.stream("x", model="m"):
        assert delta.text == "a"
        break
    mesh.wait_until(lambda mesh: mesh.num_ended == 1)


def test_several_threads_share_one_client(mesh: FakeMesh, client: SyncMeshClient) -> None:
    with ThreadPoolExecutor(8) as pool:
        completions = list(pool.map(lambda number: client.generate(f"{number}", model="m"), range(32)))
    assert [completion.text for completion in completions] == ["abc"] * 32
    assert {request.text for request in mesh.requests} == {str(number) for number in range(32)}


@contextmanager
def ctrl_c_once(condition: Callable[[], bool]) -> Iterator[None]:
    """Interrupts the main thread once, as Ctrl-C does, when it waits for a future and ``condition`` holds.

    A signal that arrives just before a thread blocks does not wake it, so the signal is sent until it has an effect.
    """
    main_thread = threading.main_thread().ident
    assert main_thread is not None
    is_interrupted = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if not is_interrupted.is_set():
            is_interrupted.set()
            raise KeyboardInterrupt

    def send() -> None:
        while not is_interrupted.wait(0.01):
            frames = traceback.extract_stack(sys._current_frames()[main_thread])
            if condition() and any(frame.name == "result" for frame in frames):
                signal.pthread_kill(main_thread, signal.SIGINT)

    previous = signal.signal(signal.SIGINT, handle)
    sender = threading.Thread(target=send)
    sender.start()
    try:
        yield
    finally:
        is_interrupted.set()
        sender.join()
        signal.signal(signal.SIGINT, previous)


def test_ctrl_c_aborts_the_request(mesh: FakeMesh, client: SyncMeshClient) -> None:
    mesh.script = [asyncio.Event()]
    with ctrl_c_once(lambda: len(mesh.requests) == 1), pytest.raises(KeyboardInterrupt):
        client.generate("x", model="m")
    mesh.wait_until(lambda mesh: mesh.num_ended == 1)
    mesh.script = output("abc")
    assert client.generate("x", model="m").text == "abc", "the client is still usable"


def test_close_aborts_the_calls_of_other_threads(mesh: FakeMesh) -> None:
    begin_endless_stream(mesh)
    with ThreadPoolExecutor(4) as pool:
        with SyncMeshClient(mesh.address) as client:
            calls = [pool.submit(client.generate, "x", model="m") for _ in range(4)]
            mesh.wait_until(lambda mesh: len(mesh.requests) == 4)
        for call in calls:
            assert isinstance(call.exception(), RequestAborted)
    mesh.wait_until(lambda mesh: mesh.num_ended == 4)


def test_close_ends_a_suspended_stream(mesh: FakeMesh) -> None:
    begin_endless_stream(mesh)
    with SyncMeshClient(mesh.address) as client:
        stream = iter(client.stream("x", model="m"))
        assert next(stream).text == "a"
    mesh.wait_until(lambda mesh: mesh.num_ended == 1)
    with pytest.raises(RequestAborted, match="the client is closed"):
        next(stream)


def test_a_closed_client_refuses_every_call_and_has_no_thread(mesh: FakeMesh) -> None:
    client = SyncMeshClient(mesh.address)
    assert client_threads() == [], "the first call starts the thread"
    client.list_models()
    assert len(client_threads()) == 1
    client.close()
    client.close()
    assert client_threads() == []
    for call in (lambda: client.generate("x"), lambda: next(iter(client.stream("x"))), client.list_models):
        with pytest.raises(RequestAborted, match="the client is closed"):
            call()
    assert mesh.requests == []


def test_an_error_inside_the_with_statement_closes_the_client(mesh: FakeMesh) -> None:
    with pytest.raises(ModelNotFound), SyncMeshClient(mesh.address) as client:
        client.generate("x", model="other")
    assert client_threads() == []
