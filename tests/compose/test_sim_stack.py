"""The stack of compose/ with a model of the sim engine: start, use, faults, end."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping

import pytest

from tests.compose.docker_engine import DockerEngine
from tests.compose.stack import Stack, running_stack

pytestmark = pytest.mark.timeout(600)  # the first test also waits for engine and images
NUM_STREAMS, NUM_TOKENS = 20, 150
START_S = 15
"""The most that `docker compose up -d --wait` may take, images built."""
SERVICES = ("redis", "unit", "kvstore", "prefill", "decode", "router")
PROMETHEUS_PORT = "50063"
QUERY = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=10).read().decode())"


@pytest.fixture(scope="module")
def sim(engine: DockerEngine, images: str, sim_values: Mapping[str, str]) -> Iterator[tuple[Stack, float]]:
    """The stack, and the seconds that its start took."""
    ports = {"PORT": "50061", "PORT_2": "50062", "PROMETHEUS_PORT": PROMETHEUS_PORT}
    with running_stack(Stack(engine, "muxmesh-sim", {**sim_values, **ports})) as stack:
        yield stack, stack.up()


@pytest.fixture(scope="module")
def undisturbed(sim: tuple[Stack, float]) -> list[list[int]]:
    """The tokens of each stream when nothing fails."""
    tokens = tokens_of_streams(sim[0])
    assert all(len(one) == NUM_TOKENS for one in tokens)
    return tokens


def tokens_of_streams(stack: Stack) -> list[list[int]]:
    """The tokens of streams that nothing disturbs."""
    with stack.streams("sim", NUM_STREAMS, NUM_TOKENS) as streams:
        pass
    return [one.tokens for one in streams]


def test_one_command_starts_everything_and_waits_until_it_serves(sim: tuple[Stack, float]) -> None:
    stack, start_s = sim
    print(f"\nsim stack healthy after {start_s:.1f} s")
    assert all(map(stack.serves, SERVICES))
    assert stack.inspect("prepare")["State"]["ExitCode"] == 0
    assert start_s < START_S


def test_a_prompt_is_answered_token_by_token_over_the_published_port(sim: tuple[Stack, float]) -> None:
    stack, _ = sim
    result = stack.muxmesh("generate", "--model", "sim", "--max-new-tokens", "20", "Hello")
    assert result.code == 0 and "20 output tokens" in result.output
    with stack.streams("sim", 1, 20) as streams:
        pass
    assert (len(streams[0].tokens), streams[0].deltas, streams[0].finish) == (20, 20, "length")


def test_status_shows_every_process_and_how_kv_is_shared(sim: tuple[Stack, float]) -> None:
    status = sim[0].status()
    roles = sorted(process["name"].split("/")[0].split("-")[0] for process in status["processes"])
    assert roles == ["decode", "kvstore", "prefill", "router"]
    assert [unit["transport"] for unit in status["units"]] == ["host shm"]


@pytest.mark.parametrize("service", SERVICES)
def test_a_killed_service_is_back_by_itself_and_streams_get_their_tokens(
    sim: tuple[Stack, float], undisturbed: list[list[int]], service: str
) -> None:
    stack, _ = sim
    with stack.streams("sim", NUM_STREAMS, NUM_TOKENS) as streams:
        back_after_s = stack.kill(service)
    print(f"\n{service} serves again {back_after_s:.1f} s after it was killed")
    if service == "router":  # it relays the streams
        assert {one.error for one in streams} == {"Unavailable"}
        assert all(one.tokens == tokens[: len(one.tokens)] for one, tokens in zip(streams, undisturbed, strict=True))
    else:
        assert {one.error for one in streams} == {""}
        assert [one.tokens for one in streams] == undisturbed
    stack.until_all_serve(SERVICES)
    assert tokens_of_streams(stack) == undisturbed


def test_kvstore_can_be_recreated_under_streams(sim: tuple[Stack, float], undisturbed: list[list[int]]) -> None:
    stack, _ = sim
    before = stack.inspect("kvstore")["Id"]
    with stack.streams("sim", NUM_STREAMS, NUM_TOKENS) as streams:
        result = stack.compose("up", "-d", "--wait", "--no-deps", "--force-recreate", "kvstore")
    assert result.code == 0, result.output
    assert stack.inspect("kvstore")["Id"] != before
    assert [one.tokens for one in streams] == undisturbed


@pytest.mark.parametrize(
    "service", ["kvstore", *(pytest.param(one, marks=pytest.mark.long) for one in ("decode", "unit"))]
)
def test_a_mesh_serves_after_docker_restart(
    sim: tuple[Stack, float], undisturbed: list[list[int]], service: str
) -> None:
    stack, _ = sim
    stack.engine.docker("restart", stack.container(service))
    stack.until_all_serve(SERVICES)
    assert tokens_of_streams(stack) == undisturbed


def test_a_router_that_has_just_started_stops_when_asked(sim: tuple[Stack, float]) -> None:
    stack, _ = sim
    router = stack.container("router")
    stack.engine.docker("restart", router)
    stack.engine.docker("stop", router)
    assert stack.inspect("router")["State"]["ExitCode"] != 137  # SIGKILL, after the grace period
    stack.engine.docker("start", router)
    stack.until_all_serve(SERVICES)


def test_a_changed_setting_restarts_the_services_that_read_it(sim: tuple[Stack, float]) -> None:
    stack, _ = sim
    unit = stack.inspect("unit")["State"]["StartedAt"]
    changed = Stack(stack.engine, stack.name, {**stack.values, "KV_POOL": "128MiB"})
    for one, kv_pool_mib in ((changed, 128), (stack, 64)):
        one.up()
        assert int(one.status()["units"][0]["pool"]["pool_bytes"]) == kv_pool_mib << 20
    assert stack.inspect("unit")["State"]["StartedAt"] == unit


def test_a_setting_of_all_services_recreates_them(sim: tuple[Stack, float], undisturbed: list[list[int]]) -> None:
    stack, _ = sim
    unit = stack.inspect("unit")["Id"]
    Stack(stack.engine, stack.name, {**stack.values, "LOG_FORMAT": "json"}).up()
    assert stack.inspect("unit")["Id"] != unit
    stack.up()
    assert tokens_of_streams(stack) == undisturbed


def test_a_second_router_serves_beside_the_first(sim: tuple[Stack, float], undisturbed: list[list[int]]) -> None:
    stack, _ = sim
    first = stack.inspect("router")["Id"]
    both = Stack(stack.engine, stack.name, stack.values, ("compose.yaml", "two-routers.yaml"))
    with stack.streams("sim", NUM_STREAMS, NUM_TOKENS) as streams:
        both.up()
    assert [one.tokens for one in streams] == undisturbed
    assert both.serves("router-2") and both.inspect("router")["Id"] == first
    for port in (both.values["PORT"], both.values["PORT_2"]):
        result = stack.muxmesh("generate", "--model", "sim", "--max-new-tokens", "9", "Hi", address=f"127.0.0.1:{port}")
        assert result.code == 0 and "9 output tokens" in result.output
    routers = [process["name"] for process in stack.status()["processes"] if process["name"].startswith("router")]
    assert len(set(routers)) == 2


def test_prometheus_scrapes_every_service(sim: tuple[Stack, float]) -> None:
    stack, _ = sim
    both = Stack(stack.engine, stack.name, stack.values, ("compose.yaml", "two-routers.yaml"))
    both.up("--profile", "metrics")

    def scraped() -> list[str]:
        url = f"http://127.0.0.1:{PROMETHEUS_PORT}/api/v1/query?query=up"
        result = stack.outside(sys.executable, "-c", QUERY, url)
        if result.code:  # it does not listen yet
            return []
        found = json.loads(result.output)["data"]["result"]
        return sorted(one["metric"]["service"] for one in found if one["value"][1] == "1")

    expected = ["decode", "kvstore", "prefill", "router", "router"]
    stack.until(lambda: scraped() == expected, f"Prometheus scrapes {expected}")


def test_down_leaves_nothing(sim: tuple[Stack, float]) -> None:
    stack, _ = sim
    assert stack.left() != []
    stack.down()
    assert stack.left() == []
