"""Whole meshes on the GPU: the same tokens as on the CPU, after faults too; workers that MPS does not limit."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import statistics
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.gpu.random_model import SMALL, TINY, write_random_model
from benchmarks.gpu_check.check import Findings
from benchmarks.mesh_process import UpProcess, up
from muxmesh.client import MeshClient
from muxmesh.cuda.mps import PIPE_DIRECTORY, MpsControl, find_control_program
from muxmesh.errors import MeshError, Unavailable

PROMPTS: tuple[list[int] | str, ...] = (
    [5, 6, 7, 8],
    [int(7 * number % 251) + 3 for number in range(200)],
    [int(11 * number % 241) + 3 for number in range(33)],
    "x",
)
NUM_TOKENS = 32
GPU_UNIT = {"device": "cuda:0", "kv_pool": "1GiB", "slab": "16MiB"}


def mesh_tokens(findings: Findings, is_dry_run: bool) -> None:
    """Greedy and seeded tokens of whole meshes in f32: a tiny model and one of SmolLM2's size, CPU against GPU."""
    with TemporaryDirectory(prefix="mm-") as scratch:
        shapes = {"tiny": TINY} if is_dry_run else {"tiny": TINY, "small": SMALL}
        device = "cpu" if is_dry_run else "cuda"
        models = [
            {"name": name, "source": str(write_random_model(Path(scratch) / name, shape, "float32", device))}
            for name, shape in shapes.items()
        ]
        asyncio.run(_compare_tokens(findings, models, is_dry_run))


async def _compare_tokens(findings: Findings, models: Sequence[Mapping[str, Any]], is_dry_run: bool) -> None:
    cpu = {"kv_pool": "256MiB", "models": [{**model, "threads": 4} for model in models]}
    gpu = {**_gpu_unit(is_dry_run), "models": models}
    names = [model["name"] for model in models]
    expected, (found, transport) = await asyncio.gather(_all_tokens(cpu, names), _all_tokens_and_transport(gpu, names))
    for key, tokens in expected.items():
        same = _common(tokens, found[key])
        findings.expect(f"{key}: tokens on the GPU equal those on the CPU", found[key] == tokens, f"{same} equal")
        findings.figure(f"{key}: distinct tokens", len(set(tokens)))
    findings.figure("transport", transport)


async def _all_tokens(unit: Mapping[str, Any], models: Sequence[str]) -> dict[str, list[int]]:
    async with mesh({"units": [unit]}) as running:
        return await _request_all(running.client, models)


async def _all_tokens_and_transport(unit: Mapping[str, Any], models: Sequence[str]) -> tuple[dict[str, list[int]], str]:
    async with mesh({"units": [unit]}) as running:
        status = str((await running.client.status()).units[0])
        return await _request_all(running.client, models), status[:2000]


async def _request_all(client: MeshClient, models: Sequence[str]) -> dict[str, list[int]]:
    """Tokens of every prompt, greedy and sampled, all at once."""
    cases = {
        f"{model}, prompt {index}, temperature {temperature}": (model, prompt, temperature)
        for model in models
        for index, prompt in enumerate(PROMPTS)
        for temperature in (0.0, 0.9)
    }
    completions = await asyncio.gather(
        *(
            client.generate(
                prompt, model=model, max_new_tokens=NUM_TOKENS, temperature=heat, seed=7, ignore_eos=True,
                repetition_penalty=1.0 if heat == 0.0 else 1.1,
            )
            for model, prompt, heat in cases.values()
        )
    )  # fmt: skip
    return {name: list(one.token_ids) for name, one in zip(cases, completions, strict=True)}


def group_restart(findings: Findings, is_dry_run: bool) -> None:
    """A decode worker of a mesh under MPS is killed with kernels in flight: its GPU's workers restart as a group."""
    with TemporaryDirectory(prefix="mm-") as scratch:
        folder = write_random_model(
            Path(scratch) / "small", TINY if is_dry_run else SMALL, "float32", "cpu" if is_dry_run else "cuda"
        )
        models = [
            {"name": name, "source": str(folder), "max_num_seqs": 8, "compute_share": share}
            for name, share in (("a", {"prefill": 60, "decode": 40}), ("b", 40))
        ]
        asyncio.run(_fault_and_compare(findings, {**_gpu_unit(is_dry_run), "mps": "on", "models": models}, is_dry_run))


async def _fault_and_compare(findings: Findings, unit: Mapping[str, Any], is_dry_run: bool) -> None:
    num_tokens = 24 if is_dry_run else 400
    async with mesh({"units": [unit]}) as running:
        expected = await _streams(running.client, num_tokens)
        before = {name: running.pid_of(name) for name in ("kvstore", "decode_svc", "prefill_svc")}
        workers = set(_workers(running))
        control = _control_of(before["decode_svc"])
        servers = await control.servers()
        findings.figure("servers", [str(server) for server in servers])
        listed = set().union(*(server.clients for server in servers))
        findings.expect(
            "the daemon lists all workers and nobody else", listed == workers, [sorted(listed), sorted(workers)]
        )
        pending = asyncio.create_task(_streams(running.client, num_tokens))
        await asyncio.sleep(0.3)
        killed_at_s = time.monotonic()
        os.kill(before["decode_svc"], signal.SIGKILL)
        statuses = await _statuses_until_replaced(running, control, workers)
        findings.figure("seconds until all workers were new", time.monotonic() - killed_at_s)
        findings.figure("server states seen", statuses)
        findings.aim("the server was seen in FAULT", any("FAULT" in status for status in statuses), statuses)
        found = await pending
        findings.figure("seconds until all requests were complete", time.monotonic() - killed_at_s)
        findings.expect("requests continue and have the same tokens", found == expected, _differing(found, expected))
        findings.expect("kvstore and its pool stayed", running.pid_of("kvstore") == before["kvstore"])
        left = workers & set(_workers(running))
        findings.expect(
            "no worker of before is left", not left or not any("FAULT" in s for s in statuses), sorted(left)
        )
        again = await _streams(running.client, num_tokens)
        findings.expect("new requests have the same tokens", again == expected, _differing(again, expected))
        status = (await running.client.status()).units[0]
        findings.expect("nothing stays leased", status.pool.leased_bytes == 0, status.pool.leased_bytes)


async def _streams(client: MeshClient, num_tokens: int) -> list[list[int]]:
    """Tokens of several requests to both models at once."""
    completions = await asyncio.gather(
        *(
            client.generate(
                [*PROMPTS[1], number], model=model, max_new_tokens=num_tokens, temperature=0, ignore_eos=True
            )
            for number in range(3, 6)
            for model in ("a", "b")
        )
    )
    return [list(one.token_ids) for one in completions]


def _differing(found: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> str:
    pairs = zip(found, expected, strict=True)
    return ", ".join(f"{_common(one, other)} of {len(other)} equal" for one, other in pairs if one != other) or "all"


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


async def _statuses_until_replaced(running: UpProcess, control: MpsControl, workers: set[int]) -> list[str]:
    """The server's states until no worker of ``workers`` is left and as many new ones run; at most 60 s."""
    seen: list[str] = []
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(60):
            while True:
                with contextlib.suppress(Unavailable):
                    state = ",".join(server.status.value for server in await control.servers())
                    if not seen or seen[-1] != state:
                        seen.append(state)
                now = set(_workers(running))
                if len(now) == len(workers) and not now & workers:
                    return seen
                await asyncio.sleep(0.02)
    return [*seen, "not replaced in 60 s"]


def unlimited_worker(findings: Findings, is_dry_run: bool) -> None:
    """A worker that finds no MPS daemon although its unit has MPS exits by itself and names the reason."""
    with TemporaryDirectory(prefix="mm-") as scratch:
        folder = write_random_model(Path(scratch) / "tiny", TINY, "float32")
        models = [{"name": "tiny", "source": str(folder), "compute_share": 50}]
        asyncio.run(_refuse(findings, {**_gpu_unit(is_dry_run), "mps": "on", "models": models}))


async def _refuse(findings: Findings, unit: Mapping[str, Any]) -> None:
    async with mesh({"units": [unit]}) as running:
        pid = running.pid_of("decode_svc")
        environment = _environment(pid)
        command = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
        findings.figure("environment of a worker", {k: v for k, v in environment.items() if "CUDA" in k})
        with TemporaryDirectory(prefix="mm-") as empty:
            for name, change in (
                ("without a daemon", {PIPE_DIRECTORY: empty}),
                ("without a limit", {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "100"}),
            ):
                process = await asyncio.create_subprocess_exec(
                    *command, env={**environment, **change}, stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.STDOUT,
                )  # fmt: skip
                try:
                    output, _ = await asyncio.wait_for(process.communicate(), 40)
                except TimeoutError:
                    process.kill()
                    output, _ = await process.communicate()
                said = output.decode(errors="replace").strip()[-600:]
                refused = process.returncode not in (0, -9) and "MPS" in said
                findings.expect(f"a worker {name} ends with an error that names MPS", refused, said)


def hand_off(findings: Findings, is_dry_run: bool) -> None:
    """Time from the first to the second token on an idle mesh, less that of a step; the pool is outside MPS."""
    with TemporaryDirectory(prefix="mm-") as scratch:
        folder = write_random_model(Path(scratch) / "tiny", TINY, "float32")
        models = [{"name": "tiny", "source": str(folder)}]
        asyncio.run(
            _time_hand_offs(
                findings, {**_gpu_unit(is_dry_run), "mps": "on", "models": models}, 3 if is_dry_run else 100
            )
        )


async def _time_hand_offs(findings: Findings, unit: Mapping[str, Any], count: int) -> None:
    async with mesh({"units": [unit]}) as running:
        kvstore = running.pid_of("kvstore")
        clients = set().union(*(s.clients for s in await _control_of(running.pid_of("decode_svc")).servers()))
        findings.expect("kvstore, which owns the pool, is no MPS client", kvstore not in clients, sorted(clients))
        gaps, steps = [], []
        for number in range(3, 3 + count):
            stream = running.client.stream([number, *range(3, 40)], max_new_tokens=8, temperature=0, ignore_eos=True)
            times = [time.perf_counter() async for delta in stream if delta.token_ids]
            between = [b - a for a, b in itertools.pairwise(times)]
            gaps.append(between[0])
            steps += between[1:]
        gap_s, step_s = statistics.median(gaps[count // 10 :]), statistics.median(steps)
        findings.figure("first_to_second_token_ms", 1e3 * gap_s)
        findings.figure("step_ms", 1e3 * step_s)
        handoff_ms = 1e3 * (gap_s - step_s)
        findings.aim("hand-off with the client's messages, over a decode step: under 1 ms", handoff_ms < 1, handoff_ms)


@contextlib.asynccontextmanager
async def mesh(config: Mapping[str, Any]) -> AsyncIterator[UpProcess]:
    """A mesh with this configuration, by `muxmesh up`. On an error the ends of its logs are printed."""
    with TemporaryDirectory(prefix="mm-") as folder:
        path = Path(folder) / "mesh.yaml"
        path.write_text(json.dumps(config))
        async with up("-c", str(path)) as running:
            try:
                yield running
            except (MeshError, AssertionError, TimeoutError, OSError):
                for log in sorted((running.state_dir / "logs").glob("*")):
                    print(f"--- {log.name}\n{log.read_text(errors='replace')[-700:]}")
                raise


def _gpu_unit(is_dry_run: bool) -> dict[str, Any]:
    return {**GPU_UNIT, "kv_pool": "64MiB", "slab": "2MiB"} if is_dry_run else dict(GPU_UNIT)


def _workers(running: UpProcess) -> list[int]:
    return [pid for pid, command in running.pids().items() if "decode_svc" in command or "prefill_svc" in command]


def _environment(pid: int) -> dict[str, str]:
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    return dict(entry.partition("=")[::2] for entry in entries if "=" in entry)


def _control_of(worker: int) -> MpsControl:
    """Control of the MPS daemon whose client a worker is, from the worker's environment."""
    program = find_control_program()
    if program is None:
        raise Unavailable("this machine has no MPS control program")
    environment = _environment(worker)
    if PIPE_DIRECTORY not in environment:
        raise Unavailable(f"worker {worker} has no {PIPE_DIRECTORY} in its environment")
    pipe_dir = Path(environment[PIPE_DIRECTORY])
    return MpsControl(program, pipe_dir, Path(environment.get("CUDA_MPS_LOG_DIRECTORY", str(pipe_dir))))
