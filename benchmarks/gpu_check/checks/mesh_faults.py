"""Faults of a mesh under MPS: the group restarts, requests go on; a worker that is not limited is refused."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.gpu_check.check import Findings
from benchmarks.gpu_check.gpu_mesh import (
    control_of,
    differing,
    environment_of,
    gpu_unit,
    mesh,
    workers_of,
    write_model,
)
from benchmarks.mesh_process import UpProcess
from muxmesh.client import MeshClient
from muxmesh.cuda.mps import PIPE_DIRECTORY, MpsControl
from muxmesh.errors import Unavailable


def group_restart(findings: Findings, is_dry_run: bool) -> None:
    """A decode worker of a mesh under MPS is killed with kernels in flight: its GPU's workers restart as a group."""
    with TemporaryDirectory(prefix="mm-") as scratch:
        folder = write_model(scratch, "small", is_dry_run)
        models = [
            {"name": name, "source": str(folder), "max_num_seqs": 8, "compute_share": share}
            for name, share in (("a", {"prefill": 60, "decode": 40}), ("b", 40))
        ]
        asyncio.run(_fault_and_compare(findings, {**gpu_unit(is_dry_run), "mps": "on", "models": models}, is_dry_run))


async def _fault_and_compare(findings: Findings, unit: Mapping[str, Any], is_dry_run: bool) -> None:
    requests = functools.partial(_streams, *((6, 8, 1) if is_dry_run else (2000, 200, 3)))
    async with mesh({"units": [unit]}) as running:
        expected = await requests(running.client)
        before = {name: running.pid_of(name) for name in ("kvstore", "decode_svc", "prefill_svc")}
        workers = set(workers_of(running))
        control = control_of(before["decode_svc"])
        servers = await control.servers()
        findings.figure("servers", [str(server) for server in servers])
        listed = set().union(*(server.clients for server in servers))
        findings.expect(
            "the daemon lists all workers and no other process", listed == workers, [sorted(listed), sorted(workers)]
        )
        pending = asyncio.create_task(requests(running.client))
        await _until_decoding(running.client, before["decode_svc"])
        killed_at_s = time.monotonic()
        os.kill(before["decode_svc"], signal.SIGKILL)
        if is_dry_run:  # a kernel that was in flight on a card: the fake daemon is told that its server faults
            (control.pipe_dir / "fake.fault").touch()
        statuses = await _statuses_until_replaced(running, control, workers, before["decode_svc"])
        findings.figure("seconds until the killed worker (after FAULT: all) was new", time.monotonic() - killed_at_s)
        findings.figure("server states seen", statuses)
        findings.aim("the server was seen in FAULT", any("FAULT" in status for status in statuses), statuses)
        found = await pending
        findings.figure("seconds until all requests were complete", time.monotonic() - killed_at_s)
        findings.expect("requests continue and have the same tokens", found == expected, differing(found, expected))
        findings.expect("kvstore and its pool stayed", running.pid_of("kvstore") == before["kvstore"])
        left = workers & set(workers_of(running))
        findings.expect(
            "after FAULT no worker of before is left", not left or not any("FAULT" in s for s in statuses), sorted(left)
        )
        again = await requests(running.client)
        findings.expect("new requests have the same tokens", again == expected, differing(again, expected))
        status = (await running.client.status()).units[0]
        findings.expect("no byte stays leased", status.pool.leased_bytes == 0, status.pool.leased_bytes)


async def _streams(num_tokens: int, prompt_tokens: int, num_requests: int, client: MeshClient) -> list[list[int]]:
    """Tokens of ``num_requests`` requests to each of the two models, all at once."""
    completions = await asyncio.gather(
        *(
            client.generate(
                [3 + 7 * (number + at) % 251 for at in range(prompt_tokens)], model=model, max_new_tokens=num_tokens,
                temperature=0, ignore_eos=True,
            )
            for number in range(num_requests)
            for model in ("a", "b")
        )
    )  # fmt: skip
    return [list(one.token_ids) for one in completions]


async def _until_decoding(client: MeshClient, pid: int) -> None:
    """Waits until the worker computes tokens, so that its kernels are in flight most of the time."""
    counts: list[int] = []
    while len(set(counts)) < 3:
        (worker,) = (one for one in (await client.status()).units[0].workers if one.pid == pid)
        counts.append(worker.num_computed_tokens)


async def _statuses_until_replaced(
    running: UpProcess, control: MpsControl, workers: set[int], killed: int
) -> list[str]:
    """The server's states until ``killed`` is replaced, or after FAULT all of ``workers``; at most 60 s."""
    seen: list[str] = []
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(60):
            while True:
                with contextlib.suppress(Unavailable):
                    state = ",".join(server.status.value for server in await control.servers())
                    if not seen or seen[-1] != state:
                        seen.append(state)
                now = set(workers_of(running))
                old = now & workers if any("FAULT" in state for state in seen) else now & {killed}
                if len(now) == len(workers) and not old:
                    return seen
                await asyncio.sleep(0.02)
    return [*seen, "not replaced in 60 s"]


def unlimited_worker(findings: Findings, is_dry_run: bool) -> None:
    """A worker that finds no MPS daemon although its unit has MPS exits by itself and names the reason."""
    with TemporaryDirectory(prefix="mm-") as scratch:
        folder = write_model(scratch, "tiny", is_dry_run)
        models = [{"name": "tiny", "source": str(folder), "compute_share": 50}]
        asyncio.run(_refuse(findings, {**gpu_unit(is_dry_run), "mps": "on", "green_contexts": False, "models": models}))


async def _refuse(findings: Findings, unit: Mapping[str, Any]) -> None:
    async with mesh({"units": [unit]}) as running:
        pid = running.pid_of("decode_svc")
        environment = environment_of(pid)
        command = Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0").split("\0")
        command[command.index("--parent") + 1] = str(os.getpid())
        findings.figure("environment of a worker", {k: v for k, v in environment.items() if k.startswith("CUDA_")})
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
                what = f"a worker {name} ends with an error that names MPS"
                findings.expect(what, refused, f"exit code {process.returncode}: {said}")
