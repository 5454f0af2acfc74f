"""The process registry, with a real redis-server where Redis is reachable."""

import asyncio
import contextlib
import json
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio
import uvloop

from muxmesh import process_registry
from muxmesh.clock import Clock, ManualClock
from muxmesh.process_registry import LIFETIME_S, ProcessRecord, ProcessRegistry, redis_key
from muxmesh.supervisor.redis_server import redis_command
from tests.support.virtual_time import VirtualClock, run_virtually


@asynccontextmanager
async def open_registry(url: str, mesh_id: str = "m", clock: Clock | None = None) -> AsyncIterator[ProcessRegistry]:
    registry = ProcessRegistry(url, mesh_id, clock or ManualClock(1000.0))
    try:
        yield registry
    finally:
        await registry.close()


@asynccontextmanager
async def open_redis(url: str) -> AsyncIterator[Any]:
    async with redis.asyncio.Redis.from_url(url, decode_responses=True) as client:
        yield client


async def until(condition: Callable[[], Awaitable[Any]]) -> None:
    """Returns when the condition holds. Each check is a call to Redis."""
    async with asyncio.timeout(20):
        while not await condition():
            await asyncio.sleep(0)


async def write_record(url: str, name: str, seen_at_unix_s: float = 1000.0, mesh_id: str = "m", **more: Any) -> None:
    record = {"name": name, "pid": 1, "address": f"unix:/{name}", "started_at_unix_s": 1.0, **more}
    async with open_redis(url) as client:
        text = json.dumps({**record, "seen_at_unix_s": seen_at_unix_s})
        await client.hset(redis_key(mesh_id, "processes"), name, text)


async def names(registry: ProcessRegistry) -> list[str] | None:
    found = await registry.processes()
    return None if found is None else [record.name for record, _ in found]


async def test_a_registered_process_is_listed_until_the_block_ends(redis_url: str) -> None:
    process = ProcessRegistry(redis_url, "m", ManualClock(1000.0))
    async with open_registry(redis_url) as reader:
        async with process.registered("router", "unix:/r.sock"):
            await until(reader.processes)
            assert await reader.processes() == [
                (ProcessRecord("router", os.getpid(), "unix:/r.sock", 1000.0, 1000.0), 0)
            ]
        assert await reader.processes() == []


@pytest.mark.parametrize(("age_s", "is_listed"), [(0.0, True), (LIFETIME_S, True), (LIFETIME_S + 0.1, False)])
async def test_a_process_without_a_recent_heartbeat_is_not_listed(
    redis_url: str, age_s: float, is_listed: bool
) -> None:
    await write_record(redis_url, "router")
    async with open_registry(redis_url, clock=ManualClock(1000.0 + age_s)) as reader:
        assert await reader.processes() == ([(_record("router"), 0)] if is_listed else [])


def _record(name: str) -> ProcessRecord:
    return ProcessRecord(name, 1, f"unix:/{name}", 1.0, 1000.0)


async def test_heartbeats_carry_the_present_time_and_the_start_of_the_process(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_registry, "HEARTBEAT_S", 0.001)
    clock = ManualClock(1000.0)
    process = ProcessRegistry(redis_url, "m", clock)

    async def seen_at_1005() -> bool:
        found = await reader.processes() or []
        return [(record.started_at_unix_s, record.seen_at_unix_s) for record, _ in found] == [(1000.0, 1005.0)]

    async with open_registry(redis_url, clock=clock) as reader, process.registered("router", "unix:/r.sock"):
        await until(reader.processes)
        clock.advance(5.0)
        await until(seen_at_1005)


async def test_a_supervisor_sets_the_restarts_of_its_processes_only(redis_url: str) -> None:
    await write_record(redis_url, "decode/chat")
    await write_record(redis_url, "prefill/chat")
    async with open_registry(redis_url) as registry:
        assert await registry.set_restarts({"decode/chat": 7})
        assert await registry.set_restarts({"prefill/chat": 2, "gone": 1})
        found = await registry.processes()
    assert found == [(_record("decode/chat"), 7), (_record("prefill/chat"), 2)]


async def test_processes_are_sorted_by_name(redis_url: str) -> None:
    for name in ("router", "decode/b", "kvstore/u", "decode/a"):
        await write_record(redis_url, name)
    async with open_registry(redis_url) as registry:
        assert await names(registry) == ["decode/a", "decode/b", "kvstore/u", "router"]


async def test_two_meshes_on_one_redis_do_not_see_each_other(redis_url: str) -> None:
    processes = {mesh_id: ProcessRegistry(redis_url, mesh_id, ManualClock(1000.0)) for mesh_id in ("m", "m2")}
    async with (
        open_registry(redis_url, "m") as first,
        open_registry(redis_url, "m2") as second,
        processes["m"].registered("router", "unix:/first.sock"),
    ):
        await until(first.processes)
        assert await second.processes() == []
        async with processes["m2"].registered("router", "unix:/second.sock"):
            await until(second.processes)
            assert await first.set_restarts({"router": 1})
            assert await first.address_of("router") == "unix:/first.sock"
            assert await second.address_of("router") == "unix:/second.sock"
            assert [restarts for _, restarts in await second.processes() or []] == [0]
        assert await names(first) == ["router"], "the end of one mesh leaves the other registered"


async def test_every_redis_key_has_the_mesh_id_as_its_hash_tag(redis_url: str) -> None:
    process = ProcessRegistry(redis_url, "blue", ManualClock(1000.0))
    async with (
        open_registry(redis_url, "blue") as reader,
        open_redis(redis_url) as client,
        process.registered("router", "unix:/r.sock"),
    ):
        await until(reader.processes)
        assert await reader.set_restarts({"router": 1})
        keys = await client.keys("*")
    assert sorted(keys) == [f"muxmesh:{{blue}}:{name}" for name in ("instances", "processes", "restarts")]


@pytest.mark.parametrize(
    ("one", "other"), [(("a", "b:c"), ("a:b", "c")), (("a", "x"), ("ab", "x")), (("a", "x"), ("a", "y"))]
)
def test_keys_of_different_meshes_or_names_differ(one: tuple[str, str], other: tuple[str, str]) -> None:
    assert redis_key(*one) != redis_key(*other)


async def test_the_address_of_a_process_is_found_by_its_name(redis_url: str) -> None:
    await write_record(redis_url, "decode/u/chat#1")
    await write_record(redis_url, "decode/u/late", seen_at_unix_s=1.0)
    async with open_registry(redis_url) as registry:
        assert await registry.address_of("decode/u/chat#1") == "unix:/decode/u/chat#1"
        assert await registry.address_of("decode/u/chat") is None
        assert await registry.address_of("decode/u/late") is None


@pytest.mark.parametrize("text", ["not json", "[]", "{}", '{"name": "x"}', "7"])
async def test_a_record_of_another_version_is_skipped(redis_url: str, text: str) -> None:
    await write_record(redis_url, "router")
    async with open_redis(redis_url) as client, open_registry(redis_url) as registry:
        await client.hset(redis_key("m", "processes"), "other", text)
        assert await names(registry) == ["router"]


async def test_a_record_with_unknown_fields_is_skipped(redis_url: str) -> None:
    await write_record(redis_url, "router")
    await write_record(redis_url, "newer", region="eu")
    async with open_registry(redis_url) as registry:
        assert await names(registry) == ["router"]


@pytest.mark.parametrize(
    "changes",
    [
        {"name": 5},
        {"name": "\ud800"},
        {"address": None},
        {"pid": "1"},
        {"pid": 0},
        {"pid": 10**20},
        {"started_at_unix_s": "q"},
        {"started_at_unix_s": float("nan")},
        {"seen_at_unix_s": "zz"},
        {"seen_at_unix_s": 10**400},
    ],
)
async def test_a_record_with_values_that_no_process_writes_is_skipped(
    redis_url: str, changes: dict[str, object]
) -> None:
    record = {"name": "x", "pid": 1, "address": "a", "started_at_unix_s": 1.0, "seen_at_unix_s": 1000.0, **changes}
    async with open_redis(redis_url) as client, open_registry(redis_url) as registry:
        await write_record(redis_url, "router")
        await client.hset(redis_key("m", "processes"), "x", json.dumps(record))
        assert await names(registry) == ["router"]


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 100_000, b""])
async def test_bytes_that_are_no_record_are_skipped(redis_url: str, content: bytes) -> None:
    async with open_redis(redis_url) as client, open_registry(redis_url) as registry:
        await write_record(redis_url, "router")
        await client.hset(redis_key("m", "processes"), "x", content)
        assert await names(registry) == ["router"]


@pytest.mark.parametrize("content", [b"abc", b"-1", b"\xff", b"9" * 5000, b""])
async def test_a_number_of_restarts_that_is_none_counts_as_zero(redis_url: str, content: bytes) -> None:
    async with open_redis(redis_url) as client, open_registry(redis_url) as registry:
        await write_record(redis_url, "router")
        await client.hset(redis_key("m", "restarts"), "router", content)
        assert [count for _, count in await registry.processes() or ()] == [0]


async def test_an_error_of_redis_reads_as_none(redis_url: str) -> None:
    async with open_redis(redis_url) as client, open_registry(redis_url) as registry:
        await client.set(redis_key("m", "processes"), "not a hash")
        assert await registry.processes() is None
        assert await registry.address_of("router") is None


async def test_without_redis_reads_return_none_and_writes_have_no_effect(tmp_path: Path) -> None:
    async with open_registry(f"unix://{tmp_path / 'none.sock'}") as registry:
        assert await registry.processes() is None
        assert await registry.address_of("router") is None
        assert await registry.set_restarts({"router": 1}) is False
        async with registry.registered("router", "unix:/r.sock"):
            await asyncio.sleep(0)


async def test_an_error_of_the_block_is_raised_without_redis(tmp_path: Path) -> None:
    registry = ProcessRegistry(f"unix://{tmp_path / 'none.sock'}", "m", ManualClock())
    with pytest.raises(LookupError, match="of the service"):
        async with registry.registered("router", "unix:/r.sock"):
            raise LookupError("of the service")


def test_a_redis_that_does_not_respond_reads_as_none(tmp_path: Path) -> None:
    path = tmp_path / "mute.sock"

    async def read() -> None:
        async def ignore(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            writer.close()

        async with await asyncio.start_unix_server(ignore, path), open_registry(f"unix://{path}") as registry:
            assert await registry.processes() is None

    run_virtually(read())


def test_an_unreachable_redis_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def serve_for_a_minute() -> None:
        registry = ProcessRegistry(f"unix://{tmp_path / 'none.sock'}", "m", VirtualClock())
        async with registry.registered("router", "unix:/r.sock"):
            await asyncio.sleep(60)

    with caplog.at_level(logging.WARNING, "muxmesh.process_registry"):
        run_virtually(serve_for_a_minute())
    (message,) = [record.getMessage() for record in caplog.records if record.name == "muxmesh.process_registry"]
    assert message.startswith("Redis is unreachable: ")
    assert message.endswith("; heartbeats are retried every 5 s")


async def test_a_process_is_registered_once_redis_becomes_reachable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(process_registry, "HEARTBEAT_S", 0.01)
    url = f"unix://{tmp_path / 'redis.sock'}"
    process = ProcessRegistry(url, "m", ManualClock(1000.0))

    async def is_unreachable() -> bool:
        return bool(caplog.records)

    async with open_registry(url) as reader, process.registered("router", "unix:/r.sock"):
        await until(is_unreachable)
        command = redis_command(tmp_path / "redis.sock", tmp_path)
        server = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.DEVNULL)
        try:
            await until(reader.processes)
            assert await names(reader) == ["router"]
        finally:
            server.terminate()
            await server.wait()


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_the_end_of_a_registration_is_never_lost(
    redis_url: str, monkeypatch: pytest.MonkeyPatch, new_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """The heartbeat is cancelled in the middle of a command to Redis, which loses every other cancellation."""
    monkeypatch.setattr(process_registry, "HEARTBEAT_S", 0.0)

    async def register_and_end() -> None:
        for _ in range(10):
            process = ProcessRegistry(redis_url, "m", ManualClock(1.0))
            async with asyncio.timeout(20), process.registered("r", "unix:/r"):
                await asyncio.sleep(0.001)

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(register_and_end())


class Instances:
    """Processes that register one after another as ``decode/m`` of the mesh ``m``, each a second after the last."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._clock = ManualClock(1000.0)

    def registered(self, **options: Any) -> contextlib.AbstractAsyncContextManager[None]:
        self._clock.advance(1.0)
        registry = ProcessRegistry(self._url, "m", self._clock)
        return registry.registered("decode/m", f"unix:/{self._clock.unix_s():.0f}", **options)

    async def restarts(self, started_at_unix_s: float | None = None) -> int:
        """The restarts that are shown once the instance of that start, by default the latest, has registered."""
        started_at_unix_s = started_at_unix_s or self._clock.unix_s()
        async with open_registry(self._url, clock=self._clock) as reader, asyncio.timeout(20):
            while True:
                for record, num_restarts in await reader.processes() or ():
                    if record.started_at_unix_s == started_at_unix_s:
                        return num_restarts
                await asyncio.sleep(0)

    async def crash(self, **options: Any) -> None:
        """An instance registers and ends with an error."""
        with contextlib.suppress(LookupError):
            async with self.registered(**options):
                await self.restarts()
                raise LookupError("crashed")


async def test_a_process_that_registers_after_a_crash_counts_a_restart(redis_url: str) -> None:
    instances = Instances(redis_url)
    for expected in (0, 1, 2):
        async with instances.registered(counts_restarts=True, has_failed=lambda: True):
            assert await instances.restarts() == expected


async def test_a_stop_as_asked_is_no_restart_and_keeps_the_count(redis_url: str) -> None:
    instances = Instances(redis_url)
    await instances.crash(counts_restarts=True)
    for _ in range(2):
        async with instances.registered(counts_restarts=True):
            assert await instances.restarts() == 1


async def test_under_a_supervisor_only_the_supervisor_counts(redis_url: str) -> None:
    instances = Instances(redis_url)
    async with open_registry(redis_url) as supervisor:
        await instances.crash()
        assert await supervisor.set_restarts({"decode/m": 3})  # two of them before it registered
        async with instances.registered():
            assert await instances.restarts() == 3


async def test_a_redis_that_lost_its_data_gets_the_count_back(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_registry, "HEARTBEAT_S", 0.001)
    instances = Instances(redis_url)
    await instances.crash(counts_restarts=True)
    async with instances.registered(counts_restarts=True), open_redis(redis_url) as client:
        assert await instances.restarts() == 1
        await client.flushall()
        assert await instances.restarts() == 1


async def test_of_two_processes_with_one_name_the_later_is_listed_and_the_earlier_reports_it_once(
    redis_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(process_registry, "HEARTBEAT_S", 0.001)
    instances = Instances(redis_url)

    async def is_reported() -> bool:
        return bool(caplog.records)

    async with instances.registered(counts_restarts=True):
        await instances.restarts()
        async with instances.registered(counts_restarts=True):
            await until(is_reported)
            assert await instances.restarts() == 1
            assert await instances.restarts(1002.0) == 1, "the earlier one does not take the name back"
        assert await instances.restarts(1001.0) == 1, "until the later one has ended"
    (message,) = [record.getMessage() for record in caplog.records]
    assert message == (
        f"another process has registered as decode/m while this one runs: pid {os.getpid()} at unix:/1002; "
        "stop one of the two, or give each router a name of its own (--name)"
    )


async def test_a_process_takes_its_name_back_when_the_other_has_crashed(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_registry, "HEARTBEAT_S", 0.001)
    instances, clock = Instances(redis_url), ManualClock(1000.0)
    process = ProcessRegistry(redis_url, "m", clock)
    async with process.registered("decode/m", "unix:/first", counts_restarts=True):
        await instances.restarts()
        await instances.crash(counts_restarts=True)
        clock.advance(LIFETIME_S + 2.0)
        async with open_registry(redis_url, clock=clock) as reader:

            async def is_back() -> bool:
                return await reader.address_of("decode/m") == "unix:/first"

            await until(is_back)


@pytest.mark.parametrize("stored", ["many", "nan", "inf", "-1", "1e99", "9" * 400, ""])
async def test_a_number_of_restarts_that_is_none_does_not_keep_a_process_from_registering(
    redis_url: str, stored: str
) -> None:
    instances = Instances(redis_url)
    async with open_redis(redis_url) as client:
        await instances.crash(counts_restarts=True)
        await client.hset(redis_key("m", "restarts"), "decode/m", stored)
        async with instances.registered(counts_restarts=True):
            assert await instances.restarts() == 1


async def test_the_end_of_a_process_does_not_remove_the_one_that_has_its_name_by_now(redis_url: str) -> None:
    instances = Instances(redis_url)
    first = instances.registered(counts_restarts=True)
    await first.__aenter__()
    await instances.restarts()
    async with instances.registered(counts_restarts=True):
        await instances.restarts()
        await first.__aexit__(None, None, None)
        assert await instances.restarts() == 1
