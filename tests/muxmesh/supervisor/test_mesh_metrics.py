import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from muxmesh.errors import ConfigError
from muxmesh.metrics.family import gauge
from muxmesh.metrics.monitor import Monitor
from muxmesh.metrics.scrape import fetch
from muxmesh.supervisor.mesh_metrics import MeshMetrics, ProcessCount

RUNNING = [ProcessCount("a", True, 0), ProcessCount("b", True, 2), ProcessCount("redis", True, 0)]

Samples = list[tuple[str, dict[str, str], float]]


def samples(text: bytes, name: str) -> Samples:
    """The samples of a name: labels and value."""
    families = text_string_to_metric_families(text.decode())
    return [(one.name, one.labels, one.value) for family in families for one in family.samples if one.name == name]


@asynccontextmanager
async def services(folder: Path, *names: str) -> AsyncIterator[dict[str, tuple[str, Monitor]]]:
    """Address and monitor of each. Each has a gauge ``g`` of value 1."""
    async with AsyncExitStack() as stack:
        found = {}
        for name in names:
            monitor = Monitor(f"unix:{folder}/{name}.http")
            monitor.add(lambda: [gauge("g", "Help.", ("model_name",), {("m",): 1})])
            found[name] = (await stack.enter_async_context(monitor.serving()), monitor)
        yield found


@asynccontextmanager
async def hung(folder: Path) -> AsyncIterator[str]:
    """A process that takes connections and sends nothing."""

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_unix_server(hang, folder / "hung.http")
    yield f"unix:{folder}/hung.http"
    server.close()


async def test_a_scrape_has_the_metrics_of_all_processes(tmp_path: Path) -> None:
    async with services(tmp_path, "a", "b") as served:
        endpoints = {name: address for name, (address, _) in served.items()}
        async with MeshMetrics(lambda: endpoints, lambda: RUNNING).serving("127.0.0.1:0") as address:
            status, text = await fetch(address, "/metrics", 20.0)
    assert status == 200
    assert samples(text, "g") == [
        ("g", {"model_name": "m", "process": "a"}, 1),
        ("g", {"model_name": "m", "process": "b"}, 1),
    ]
    assert text.count(b"# TYPE g gauge") == text.count(b"# HELP g Help.") == 1
    memory = samples(text, "process_resident_memory_bytes")
    assert [labels["process"] for _, labels, _ in memory] == ["a", "b", "supervisor"]
    assert [(labels["process"], value) for _, labels, value in samples(text, "muxmesh_process_restarts_total")] == [
        ("a", 0),
        ("b", 2),
        ("redis", 0),
    ]
    assert [(labels["process"], value) for _, labels, value in samples(text, "muxmesh_scrape_ok")] == [
        ("a", 1),
        ("b", 1),
    ]


async def test_a_process_that_hangs_costs_only_its_own_metrics(tmp_path: Path) -> None:
    async with services(tmp_path, "a") as served, hung(tmp_path) as hanging:
        endpoints = {"a": served["a"][0], "b": hanging, "gone": f"unix:{tmp_path}/gone.http"}
        async with MeshMetrics(lambda: endpoints, lambda: RUNNING, timeout_s=2.0).serving("127.0.0.1:0") as address:
            _, text = await fetch(address, "/metrics", 20.0)
            status, reasons = await fetch(address, "/ready", 20.0)
    assert [labels["process"] for _, labels, _ in samples(text, "g")] == ["a"]
    assert [(labels["process"], value) for _, labels, value in samples(text, "muxmesh_scrape_ok")] == [
        ("a", 1),
        ("b", 0),
        ("gone", 0),
    ]
    assert status == 503
    assert f"not ready: b: {hanging} did not respond within 2 s\n" in reasons.decode()


async def test_a_scrape_is_of_the_processes_that_the_mesh_had_when_it_began(tmp_path: Path) -> None:
    async with services(tmp_path, "a") as served:
        before = iter([{"a": served["a"][0], "b": f"unix:{tmp_path}/unloaded.http"}])
        async with MeshMetrics(lambda: next(before), lambda: RUNNING).serving("127.0.0.1:0") as address:
            status, text = await fetch(address, "/metrics", 20.0)
    assert status == 200 and next(before, None) is None, "a model that is loaded meanwhile is in the next one"
    assert [(labels["process"], value) for _, labels, value in samples(text, "muxmesh_scrape_ok")] == [
        ("a", 1),
        ("b", 0),
    ]


async def test_a_mesh_is_ready_when_all_of_its_processes_are(tmp_path: Path) -> None:
    processes = [ProcessCount("a", True, 0), ProcessCount("redis", False, 1)]
    async with services(tmp_path, "a") as served:
        monitor = served["a"][1]
        endpoints = {"a": served["a"][0]}
        async with MeshMetrics(lambda: endpoints, lambda: processes).serving("127.0.0.1:0") as address:
            found = [await fetch(address, "/ready", 20.0)]
            processes[1] = ProcessCount("redis", True, 2)
            found.append(await fetch(address, "/ready", 20.0))
            monitor.report()
            found.append(await fetch(address, "/ready", 20.0))
            assert await fetch(address, "/live", 20.0) == (200, b"live\n")
    assert found == [
        (503, b"not ready: redis: does not run\nnot ready: a: starting\n"),
        (503, b"not ready: a: starting\n"),
        (200, b"ready\n"),
    ]


async def test_an_address_in_use_is_refused() -> None:
    async with MeshMetrics(dict, lambda: RUNNING).serving("127.0.0.1:0") as address:
        with pytest.raises(ConfigError, match="Address already in use"):
            async with MeshMetrics(dict, lambda: RUNNING).serving(address):
                pass
