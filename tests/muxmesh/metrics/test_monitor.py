import subprocess
import sys

import pytest
from prometheus_client.parser import text_string_to_metric_families

from muxmesh import __version__
from muxmesh.errors import ConfigError
from muxmesh.metrics.family import gauge
from muxmesh.metrics.monitor import Monitor
from tests.muxmesh.metrics.test_http_endpoint import get, sent


def body(response: bytes) -> str:
    return response.partition(b"\r\n\r\n")[2].decode()


async def test_a_scrape_has_the_values_of_every_collector() -> None:
    monitor = Monitor("127.0.0.1:0")
    monitor.add(lambda: [gauge("g", "Help.", ("model_name",), {("a",): 1})])
    monitor.add(lambda: [gauge("g", "Help.", ("model_name",), {("b",): 2})])
    async with monitor.serving() as address:
        text = body(await sent(address, get("/metrics")))
    parsed = {family.name: family for family in text_string_to_metric_families(text)}
    assert [(sample.labels["model_name"], sample.value) for sample in parsed["g"].samples] == [("a", 1), ("b", 2)]
    assert parsed["muxmesh_build_info"].samples[0].labels == {"version": __version__}
    assert text.count("# TYPE g gauge") == 1


async def test_readiness_has_its_reason() -> None:
    monitor = Monitor("127.0.0.1:0")
    async with monitor.serving() as address:
        assert (await sent(address, get("/live"))).startswith(b"HTTP/1.1 200 ")
        starting = await sent(address, get("/ready"))
        monitor.report()
        ready = await sent(address, get("/ready"))
        monitor.report("stopping")
        stopping = await sent(address, get("/ready"))
    assert starting.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
    assert body(starting) == "not ready: starting\n"
    assert ready.startswith(b"HTTP/1.1 200 OK\r\n")
    assert body(stopping) == "not ready: stopping\n"


async def test_without_an_address_nothing_is_served() -> None:
    async with Monitor().serving() as address:
        assert address == ""


async def test_an_address_in_use_is_refused() -> None:
    async with Monitor("127.0.0.1:0").serving() as address:
        with pytest.raises(ConfigError, match="Address already in use"):
            async with Monitor(address).serving():
                pass


def test_without_metrics_a_service_loads_neither_prometheus_client_nor_h11() -> None:
    script = "import kvstore.__main__, sys; print(sorted({'prometheus_client', 'h11'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True).stdout == "[]\n"
