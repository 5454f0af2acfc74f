"""Our mesh and vLLM's server under the same load, with the same weights, cores, KV memory and batch cap.

`VLLM_PYTHON` names an interpreter that has vLLM. `python -m benchmarks.vs_vllm JSONL ...` sends the prompts as chats;
outputs stop by themselves or at 128 tokens. Both systems stay up and one of them is stopped (SIGSTOP), so that compared
runs are only minutes apart: the machine's speed changes. With ``--pd`` there is a third system: vLLM's pair of a
prefill and a decode server over NIXL, each with half of the KV memory, behind `benchmarks.vllm_pd_proxy`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import uvloop

from benchmarks.mesh_process import children_of, mesh_target
from benchmarks.prompts import prompts_of, write_prompts
from benchmarks.report import OUT, Report
from loadtest.html import page
from loadtest.openai_target import OpenAiTarget
from loadtest.report import bottleneck
from loadtest.session import Options, Session
from loadtest.slo import Unloaded
from loadtest.spec import Spec, parse_spec
from loadtest.sweep import build_sweep
from loadtest.table import compare
from loadtest.target import Target
from muxmesh.cli.common import cache_dir, date_now
from muxmesh.clock import SystemClock
from muxmesh.config.schema import DEFAULT_MODEL
from muxmesh.models.catalog import CATALOG
from muxmesh.models.model_download import ensure_model

CAP = 128
TEMPERATURE = 0.7
BATCH_CAP = 16
MAX_MODEL_LEN = 2048
KV_GIB = 1
LOADS = (0.5, 0.9, 1.1)
_START_TIMEOUT_S = 400
_WARM_UP = 4


@dataclass
class System:
    """A running server, which is stopped while another one is measured."""

    name: str
    target: Target
    roots: Sequence[int]

    def freeze(self, stop: bool) -> None:
        """Stops all processes of the system, or continues them."""
        for root in self.roots:
            for pid in (root, *children_of(root)):
                with suppress(ProcessLookupError):  # a child has ended meanwhile
                    os.kill(pid, signal.SIGSTOP if stop else signal.SIGCONT)


@contextmanager
def vllm_server(
    python: str, folder: Path, port: int, kv_gib: float, log: Path, *more: str, **env: str
) -> Iterator[int]:
    """Runs the OpenAI server of vLLM on loopback; yields its process id once it serves."""
    command = [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name", "m",
        "--dtype", "float32", "--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", str(BATCH_CAP),
        "--host", "127.0.0.1", "--port", str(port), "--kv-cache-memory-bytes", str(int(kv_gib * 2**30)),
        "--enable-prefix-caching", "--enable-prompt-tokens-details", *more,
    ]  # fmt: skip
    environment = os.environ | {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))), "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING",
        **env,
    }  # fmt: skip
    with log.open("w") as output, subprocess.Popen(command, env=environment, stdout=output, stderr=output) as process:
        try:
            deadline_s = time.monotonic() + _START_TIMEOUT_S
            while not _serves(port):
                if process.poll() is not None or time.monotonic() > deadline_s:
                    raise SystemExit(f"vLLM did not start; see {log}")
                time.sleep(1)
            yield process.pid
        finally:
            for pid in (process.pid, *children_of(process.pid)):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
            process.send_signal(signal.SIGINT)
            process.wait(60)


def _serves(port: int) -> bool:
    try:
        with urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


@asynccontextmanager
async def our_mesh() -> AsyncIterator[System]:
    """A mesh with the default model and the limits of the vLLM server."""
    config = {
        "units": [{
            "kv_pool": f"{KV_GIB}GiB",
            "models": [{"name": DEFAULT_MODEL, "max_num_seqs": BATCH_CAP, "max_model_len": MAX_MODEL_LEN}],
        }]
    }  # fmt: skip
    async with mesh_target("vs_vllm_mesh", config, TEMPERATURE) as (mesh, target):
        system = System("muxmesh", target, [mesh.process.pid])
        try:
            yield system
        finally:
            system.freeze(False)


async def measure(
    system: System, others: Sequence[System], spec: Spec, unloaded: Unloaded | None, calibrate: int = 0
) -> dict[str, Any]:
    """The report of one run, during which all other systems are stopped."""
    for other in others:
        other.freeze(True)
    try:
        options = Options(system.name, date_now(), calibrate=calibrate, unloaded=unloaded)
        report = await Session(system.target, options, SystemClock()).run(spec)
    finally:
        for other in others:
            other.freeze(False)
    if (reason := bottleneck(report)) is not None:
        print(f"warning: {reason}")
    shown = {key: round(report[key] or 0, 2) for key in ("output_throughput", "median_ttft_ms", "median_tpot_ms")}
    print(f"{spec.text.split(' prompts')[0]} {system.name}: {shown}, {report['failed']} failed", flush=True)
    return report


async def bench(prompts: Path, with_pair: bool, minutes: float) -> int:
    """Measures the capacity of vLLM, then all systems at fractions of it."""
    python = os.environ.get("VLLM_PYTHON")
    if not python:
        raise SystemExit("VLLM_PYTHON has to name an interpreter that has vLLM")
    folder = ensure_model(CATALOG[DEFAULT_MODEL], cache_dir(), lambda what, done, total: None)
    base = f"prompts={prompts} chat=yes cap={CAP}"
    async with AsyncExitStack() as stack:
        systems = [await stack.enter_async_context(our_mesh())]
        systems[0].freeze(True)
        print("starting vLLM, which takes two minutes ...", flush=True)
        pid = stack.enter_context(vllm_server(python, folder, 8123, KV_GIB, OUT / "vllm.log"))
        systems.append(await openai_system(stack, "vllm", 8123, [pid]))
        if with_pair:
            try:
                systems.append(await _pair(stack, python, folder))
            except SystemExit as error:
                print(f"without vLLM's pair: {error}", flush=True)
        systems[0].freeze(False)
        vllm = systems[1]
        for system in systems:
            others = [other for other in systems if other is not system]
            await measure(system, others, parse_spec(f"rate=inf {base} requests={_WARM_UP} seed=9"), None)
        at_once = {}
        for number, system in enumerate([vllm, *(s for s in systems if s is not vllm)]):
            others = [other for other in systems if other is not system]
            line = f"rate=inf {base} requests=64 seed=100"
            at_once[system.name] = await measure(system, others, parse_spec(line), None, 0 if number else 4)
        unloaded = Unloaded(**at_once["vllm"]["slo"]["unloaded"])
        rate = at_once["vllm"]["request_throughput"]
        runs: dict[str, list[dict[str, Any]]] = {system.name: [] for system in systems}
        for turn, load in enumerate(LOADS):
            text = f"rate={load * rate:.3f} {base} requests={max(32, round(load * rate * 60 * minutes))} seed={turn}"
            for system in systems[:: 1 if turn % 2 == 0 else -1]:
                others = [other for other in systems if other is not system]
                runs[system.name].append(await measure(system, others, parse_spec(text), unloaded))
    return _finish(at_once, runs)


async def openai_system(stack: AsyncExitStack, name: str, port: int, roots: Sequence[int]) -> System:
    """A target for the OpenAI server at ``port`` of loopback, whose processes are those of ``roots``."""
    target = OpenAiTarget(f"http://127.0.0.1:{port}", range(1000, 30_000), TEMPERATURE, None)
    stack.push_async_callback(target.close)
    await target.models()
    return System(name, target, roots)


async def _pair(stack: AsyncExitStack, python: str, folder: Path) -> System:
    """Runs vLLM's prefill and decode servers over NIXL, and the proxy in front of them."""
    transfer = json.dumps({"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"})
    roots = []
    for index, role in enumerate(("prefill", "decode")):
        # Waiting threads must not spin: each server would take the cores from the other (4.6 tokens/s instead of 18).
        env = {
            "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1", "VLLM_NIXL_SIDE_CHANNEL_PORT": str(5600 + 10 * index),
            "OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0",
        }  # fmt: skip
        roots.append(
            stack.enter_context(
                vllm_server(
                    python, folder, 8124 + index, KV_GIB / 2, OUT / f"vllm_{role}.log",
                    "--kv-transfer-config", transfer, **env,
                )
            )
        )  # fmt: skip
    proxy = subprocess.Popen([sys.executable, "-m", "benchmarks.vllm_pd_proxy", "8126", "8124", "8125"])
    stack.callback(proxy.wait, 10)
    stack.callback(proxy.terminate)
    while not _serves(8126):
        if proxy.poll() is not None:
            raise SystemExit("the proxy of the vLLM pair did not start")
        await asyncio.sleep(0.2)
    return await openai_system(stack, "vllm p/d", 8126, [*roots, proxy.pid])


def _finish(at_once: Mapping[str, dict[str, Any]], runs: Mapping[str, Sequence[dict[str, Any]]]) -> int:
    sweeps = [build_sweep(reports, 5, 0.9) for reports in runs.values()]
    (OUT / "vs_vllm_reports.json").write_text(json.dumps(sweeps) + "\n")
    (OUT / "vs_vllm.html").write_text(page(json.loads(json.dumps(sweeps))))
    report = Report("vs_vllm")
    report.figures = {
        "capacity_req_per_s": {name: one["request_throughput"] for name, one in at_once.items()},
        "highest_rate_within_slo": {sweep["name"]: sweep["highest_rate_within_slo"] for sweep in sweeps},
    }
    ours, log_parts = runs["muxmesh"], []
    for name in [name for name in runs if name != "muxmesh"]:
        for text, key in (("requests/s", "request_throughput"), ("tokens/s", "output_throughput")):
            ratio = at_once["muxmesh"][key] / at_once[name][key]
            report.bar(f"{text}, 64 at once, ours / {name}", ratio, "above 1", ratio > 1)
        for index, load in enumerate(LOADS):
            mine, other = ours[index], runs[name][index]
            print(f"\n{load} of vLLM's capacity\n{compare([other, mine])}")
            # Below capacity both serve all requests, and the ratio depends on the length of the last outputs.
            ratio = mine["request_throughput"] / other["request_throughput"]
            report.bar(f"requests/s at {load}, ours / {name}", ratio, *(("above 1", ratio > 1) if load > 1 else ()))
            for text, key in (("median TTFT", "median_ttft_ms"), ("median TPOT", "median_tpot_ms")):
                ratio = mine[key] / other[key]
                report.bar(f"{text} at {load}, ours / {name}", ratio, "below 1", ratio < 1)
            keys = (
                "output_throughput",
                "median_ttft_ms",
                "p99_ttft_ms",
                "median_tpot_ms",
                "median_e2el_ms",
                "p99_e2el_ms",
            )
            log_parts.append(f"{name} {load}: " + ", ".join(f"{key} {mine[key] / other[key]:.2f}" for key in keys))
    mean_tokens = {
        name: statistics.fmean(r["total_output_tokens"] / r["completed"] for r in of) for name, of in runs.items()
    }
    report.figures["mean_answer_tokens"] = mean_tokens
    print("\nFor docs/log.md, ours / theirs: " + "; ".join(log_parts))
    print(f"Outputs are sampled, so their lengths differ: mean tokens {mean_tokens}. Page: {OUT / 'vs_vllm.html'}")
    return 0 if report.write() else 1


def main() -> int:
    """Parses the arguments, merges the prompt files, runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompts", nargs="+", type=Path)
    parser.add_argument("--pd", action="store_true", help="also measure vLLM's own prefill/decode pair")
    parser.add_argument("--minutes", type=float, default=1.5, help="duration of each run")
    arguments = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    mixed = OUT / "vs_vllm_prompts.jsonl"
    write_prompts(mixed, prompts_of(arguments.prompts))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(bench(mixed, arguments.pd, arguments.minutes))


if __name__ == "__main__":
    sys.exit(main())
