"""The Pods of deploy/k8s/overlays/local-sim in a Docker engine: requests, the loss of processes and of a host."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest

from tests.compose.docker_engine import DockerEngine
from tests.compose.pods import Pods
from tests.deploy.test_kubernetes import render

ROUTER = "router-0.router"
UNIT_PROCESSES = ("kvstore", "prefill-sim", "decode-sim")
READY_S = 60
TOKENS = 600


@pytest.fixture(scope="module")
def pods(engine: DockerEngine, images: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pods]:
    assert images == "dev"
    running = Pods(engine, render("overlays/local-sim"), tmp_path_factory.mktemp("pods"))
    with running.running():
        running.until_ready(READY_S)
        yield running


def generate(engine: DockerEngine, num_tokens: int = TOKENS) -> subprocess.Popen[str]:
    """A client of the router, with greedy tokens of the sim engine, 10 ms each."""
    command = (
        "docker", "exec", ROUTER, "muxmesh", "generate", "--address", "127.0.0.1:50051", "--temperature", "0",
        "--max-new-tokens", str(num_tokens), "Hello",
    )  # fmt: skip
    environment = {**os.environ, **engine.environment}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until_busy(pods: Pods, client: subprocess.Popen[str]) -> None:
    """Waits until a worker computes the client's request."""
    while not pods.num_running("sim"):
        assert client.poll() is None, client.communicate()


def output_of(client: subprocess.Popen[str]) -> str:
    output, errors = client.communicate(timeout=120)
    assert client.returncode == 0, output + errors
    return output


@pytest.fixture(scope="module")
def undisturbed(engine: DockerEngine, pods: Pods) -> str:
    output = output_of(generate(engine))
    assert len(output.strip()) >= TOKENS - 2, "a character for each token, of which spaces may be at the ends"
    return output


def test_the_router_calls_the_unit_by_the_name_and_ports_of_its_pod(engine: DockerEngine, pods: Pods) -> None:
    status = engine.docker("exec", ROUTER, "muxmesh", "status", "--address", "127.0.0.1:50051")
    for line in ("kvstore/unit-0", "unit-0.unit:50100", "unit-0.unit:50101", "unit-0.unit:50102", "router-0"):
        assert line in status
    assert "memory shared by host shm" in status


@pytest.mark.parametrize(
    "container", [UNIT_PROCESSES[0], *(pytest.param(one, marks=pytest.mark.long) for one in UNIT_PROCESSES[1:])]
)
def test_a_stream_survives_the_loss_of_a_container_of_the_unit(
    engine: DockerEngine, pods: Pods, undisturbed: str, container: str
) -> None:
    client = generate(engine)
    until_busy(pods, client)
    engine.kill(f"unit-0.{container}")
    assert output_of(client) == undisturbed
    pods.until_ready(READY_S)


def test_a_router_finds_the_unit_again_after_it_has_moved_to_another_address(
    engine: DockerEngine, pods: Pods, undisturbed: str
) -> None:
    client = generate(engine)
    until_busy(pods, client)
    pods.replace("unit-0")
    assert output_of(client) == undisturbed
    pods.until_ready(READY_S)
