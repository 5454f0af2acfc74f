"""The metrics of a real mesh, compared with what the documentation lists."""

import re
import shutil
import signal
import subprocess
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families

from muxmesh.errors import ModelNotFound
from muxmesh.metrics.scrape import fetch
from tests.support.mesh import SIM_MODEL, RunningMesh, Scrape, running_mesh

pytestmark = [pytest.mark.mesh, pytest.mark.asyncio(loop_scope="module")]
_WITHOUT_SAMPLES = frozenset({"muxmesh_predictor_tau", "muxmesh_quota_refusals_total"})
"""There are too few outputs for a tau, and no tenants."""

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
PROMPT = "words that only this prompt has"
SLO = {"ttft_s": 600, "tpot_s": 1e-9}
"""The first target is always met, the second one never."""
CONFIG: dict[str, Any] = {
    "metrics": {"listen": "127.0.0.1:0"},
    "units": [
        {"kv_pool": "16MiB", "slab": "1MiB", "models": [{**SIM_MODEL, "slo": SLO}, {**SIM_MODEL, "name": "other"}]}
    ],
}
SERVICES = {"router", "kvstore", "prefill", "decode"}


@dataclass
class Metric:
    """One metric of the documentation or of a scrape. ``labels``: without those that every metric may have."""

    kind: str = ""
    labels: set[str] = field(default_factory=set)
    processes: set[str] = field(default_factory=set)


@dataclass
class ScrapedMesh:
    mesh: RunningMesh
    metrics: Scrape


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def scraped(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ScrapedMesh]:
    """A mesh that has served some requests, and its metrics."""
    async with running_mesh(tmp_path_factory.mktemp("metrics"), **CONFIG) as mesh:
        for _ in range(3):
            await mesh.client.generate(PROMPT, model="sim", max_new_tokens=20)
        with pytest.raises(ModelNotFound):
            await mesh.client.generate(PROMPT, model=PROMPT)
        await mesh.until_free()
        yield ScrapedMesh(mesh, await mesh.metrics())


def documented() -> dict[str, Metric]:
    """The metrics of the table, by name."""
    found = {}
    for row in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in row.split("|")]
        if not row.startswith("| `") or len(cells) != 7 or cells[2] not in ("counter", "gauge", "histogram"):
            continue
        processes = set(cells[4].split(", "))
        if "service" in processes:
            processes = processes - {"service"} | SERVICES
        found[cells[1].strip("`")] = Metric(cells[2], set(re.findall(r"`(\w+)`", cells[3])), processes)
    return found


def exported(text: str) -> dict[str, Metric]:
    """The metrics of a scrape, by name. One without samples has neither labels nor processes."""
    found: defaultdict[str, Metric] = defaultdict(Metric)
    own = ("muxmesh_process_up", "muxmesh_process_restarts_total", "muxmesh_scrape_ok")
    for family in text_string_to_metric_families(text):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        found[name].kind = family.type
        for sample in family.samples:
            process = "supervisor" if name in own else sample.labels["process"].partition("/")[0]
            found[name].processes.add(process)
            found[name].labels |= sample.labels.keys() - {"process", "le"}
    return dict(found)


async def test_every_metric_is_documented_and_every_documented_metric_is_there(scraped: ScrapedMesh) -> None:
    expected, found = documented(), exported(scraped.metrics.text)
    assert found.keys() == expected.keys()
    for name, metric in found.items():
        if metric.processes:
            assert metric == expected[name], name
        else:
            assert name in _WITHOUT_SAMPLES and metric.kind == expected[name].kind, name


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian package prometheus)")
async def test_promtool_dislikes_nothing_but_the_names_of_vllm(scraped: ScrapedMesh) -> None:
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=scraped.metrics.text, capture_output=True, text=True, check=False
    )
    problems = (checked.stdout + checked.stderr).splitlines()
    assert [line for line in problems if not re.fullmatch(r"vllm:\w+ metric names should not contain ':'", line)] == []


async def test_nothing_of_a_prompt_is_in_the_metrics(scraped: ScrapedMesh) -> None:
    assert "words that only" not in scraped.metrics.text


async def test_the_values_are_those_of_the_requests(scraped: ScrapedMesh) -> None:
    value = scraped.metrics.value
    assert value("vllm:request_success_total", model_name="sim", finished_reason="length") == 3
    assert value("muxmesh_requests_total", model_name="sim", code="OK") == 3
    assert value("muxmesh_requests_total", model_name="", code="NOT_FOUND") == 1
    assert value("vllm:generation_tokens_total", model_name="sim") == 60
    assert value("vllm:request_generation_tokens_sum", model_name="sim") == 60
    assert value("vllm:inter_token_latency_seconds_count", model_name="sim") == 57
    assert value("vllm:time_to_first_token_seconds_count") == value("vllm:e2e_request_latency_seconds_count") == 3
    assert value("muxmesh_handoff_seconds_count", model_name="sim", transport="host shm") == 3
    assert value("muxmesh_kv_copied_bytes_total") == 0
    assert value("muxmesh_worker_computed_tokens_total", model_name="sim", role="decode") == 57
    assert value("muxmesh_requests_waiting") == value("muxmesh_requests_running") == 0
    assert value("vllm:kv_cache_usage_perc") == 0
    assert value("muxmesh_pool_bytes") == 16 * 1024 * 1024
    assert value("muxmesh_workers_ready") == 4
    assert value("muxmesh_scrape_ok") == 6
    assert value("muxmesh_process_up") == 7, "with Redis"


async def test_the_requests_of_a_model_with_an_slo_are_counted_by_what_they_met(scraped: ScrapedMesh) -> None:
    met = {
        one: scraped.metrics.value("muxmesh_slo_met_total", model_name="sim", target=one) for one in ("ttft", "both")
    }
    assert met == {"ttft": 3, "both": 0}
    sim, other = (await scraped.mesh.client.status()).models
    assert (sim.slo.total.num_requests, sim.slo.total.num_ttft_met, sim.slo.total.num_tpot_met) == (3, 3, 0)
    assert not other.HasField("slo")
    info, _ = await scraped.mesh.client.list_models()
    assert (info.slo.ttft_s, info.slo.HasField("scale")) == (600, False)


async def test_the_metrics_agree_with_the_status(scraped: ScrapedMesh) -> None:
    (unit,) = (await scraped.mesh.client.status()).units
    value = scraped.metrics.value
    assert value("muxmesh_handoff_seconds_count") == unit.pool.num_handoffs
    assert value("muxmesh_pool_bytes", state="cached") == unit.pool.cached_bytes
    assert value("vllm:prefix_cache_hits_total") == sum(one.num_prefix_tokens_hit for one in unit.models)
    assert value("muxmesh_worker_steps_total") == sum(worker.num_steps for worker in unit.workers)


async def test_a_mesh_is_ready_and_after_the_end_of_a_worker_says_which_one_is_not(scraped: ScrapedMesh) -> None:
    mesh = scraped.mesh
    address = mesh.mesh.metrics_address
    assert await fetch(address, "/ready", 20.0) == (200, b"ready\n")
    mesh.process("decode/other").signal(signal.SIGKILL)
    reasons: set[str] = set()

    async def is_not_ready() -> bool:
        status, body = await fetch(address, "/ready", 20.0)
        reasons.update(body.decode().splitlines())
        return status == 503

    await mesh.until(is_not_ready)
    assert all(reason.startswith("not ready: decode/other: ") for reason in reasons - {"ready"})

    async def is_restarted() -> bool:
        return (await fetch(address, "/ready", 20.0))[0] == 200

    await mesh.until(is_restarted)
    assert (await mesh.metrics()).value("muxmesh_process_restarts_total", process="decode/other") == 1
