"""The stack of compose/ as it is committed: SmolLM2, downloaded by prepare into the cache volume."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.compose.conftest import MakeStack
from tests.compose.docker_engine import DockerEngine
from tests.compose.stack import Stack, running_stack
from tests.support.tiny import TinyShape, write_tiny_model

pytestmark = pytest.mark.timeout(600)  # the first test also waits for engine and images
MODEL = "smollm2-135m-instruct"
WARM_START_S = 60
"""The most that `docker compose up -d --wait` may take when the model and the kernels are in the cache volume."""
READ_METRICS = "import urllib.request; print(urllib.request.urlopen('http://127.0.0.1:9464/metrics').read().decode())"


@pytest.fixture(scope="module")
def smollm(engine: DockerEngine, images: str, index_values: Mapping[str, str]) -> Iterator[tuple[Stack, float]]:
    """The stack, and the seconds that its second start took: the first one filled the cache."""
    values = {"PORT": "50066", "START_PERIOD": "180s", **index_values}
    with running_stack(Stack(engine, "muxmesh-model", values)) as stack:
        cold_s = stack.up()
        assert stack.compose("down", "--timeout", "5").code == 0
        warm_s = stack.up()
        print(f"\nSmolLM2 healthy after {cold_s:.1f} s with an empty cache, {warm_s:.1f} s with a warm one")
        yield stack, warm_s


def test_it_serves_within_a_minute_with_a_warm_cache(smollm: tuple[Stack, float]) -> None:
    _, warm_s = smollm
    assert warm_s < WARM_START_S


def test_a_chat_is_answered_over_the_published_port(smollm: tuple[Stack, float]) -> None:
    stack, _ = smollm
    result = stack.muxmesh("generate", "--chat", "--temperature", "0", "What is the capital of France?")
    assert result.code == 0 and "The capital of France is Paris." in result.output


def test_no_byte_of_kv_is_copied_from_container_to_container(smollm: tuple[Stack, float]) -> None:
    stack, _ = smollm
    with stack.streams(MODEL, 4, 24) as streams:
        pass
    assert all(one.tokens and not one.error for one in streams)
    (unit,) = stack.status()["units"]
    assert unit["transport"] == "host shm"
    assert int(unit["pool"]["num_handoffs"]) >= 4
    for service in ("prefill", "decode"):
        metrics = stack.compose("exec", "-T", service, "python", "-c", READ_METRICS).output
        assert metric("muxmesh_worker_computed_tokens_total", metrics) > 0
        assert metric("muxmesh_kv_copied_bytes_total", metrics) == 0


@pytest.mark.long
def test_a_model_folder_of_ones_own_is_served(stack: MakeStack, tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    write_tiny_model(models / "tiny", TinyShape())
    for file in (models / "tiny").iterdir():
        file.chmod(0o644)  # transformers writes weights for their owner alone
    source = {"MODELS_DIR": str(models), "MODEL": "own", "SOURCE": "/models/tiny", "MESH_FILE": "./mesh.yaml"}
    one = stack({**source, "START_PERIOD": "180s"})
    one.up()
    result = one.muxmesh("generate", "--model", "own", "--max-new-tokens", "4", "Hi")
    assert result.code == 0 and "4 output tokens" in result.output


def metric(name: str, text: str) -> float:
    """The one value of a metric."""
    (value,) = re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)
    return float(value)
