"""MPS on a real card: shares, fences and faults as the product's control of it sees them, and its answers as text."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.gpu.mps_daemon import control_program, mps_client, mps_daemon
from benchmarks.gpu.peer import Peer, PeerError
from benchmarks.gpu_check.check import Findings
from muxmesh.cuda.mps import PIPE_DIRECTORY, MpsControl, ServerStatus
from muxmesh.errors import Unavailable

SIZE = 64 << 20
SPIN_CYCLES = 400_000_000_000
"""Minutes of a kernel that only waits."""


End = Callable[[Findings, MpsControl, int, Peer], Awaitable[None]]
"""A way in which a client ends, given its server and itself."""


async def _server_of(control: MpsControl, client: Peer) -> int:
    """The pid of the server that lists this client."""
    return next(server.pid for server in await control.servers() if client.pid in server.clients)


def mps_shares(findings: Findings, is_dry_run: bool) -> None:
    """SM count, product and copy speed at shares of 100, 50, 30 and 10 percent, one client at a time."""
    asyncio.run(_measure_shares(findings))


async def _measure_shares(findings: Findings) -> None:
    with Peer("torch") as outside:
        full = outside.ask("info")
    findings.expect("outside MPS no client sees itself attached", not full["is_mps_client"], full)
    rates: dict[int, dict[str, float]] = {}
    async with mps_daemon() as control:
        with contextlib.ExitStack() as stack:
            clients = {share: stack.enter_context(mps_client(control, share)) for share in (100, 50, 30, 10)}
            for client in clients.values():
                client.tell("info")
            for share, client in clients.items():
                info = client.reply()
                most = full["num_sms"] * share // 100
                findings.expect(f"{share} %: attached", info["is_mps_client"], info["is_mps_client"])
                findings.expect(f"{share} %: SMs at most {most}", most - 2 <= info["num_sms"] <= most, info["num_sms"])
                findings.expect(f"{share} %: torch sees as many", info["torch_sms"] == info["num_sms"])
            for share, client in clients.items():
                rates[share] = client.ask("ceilings", copied_bytes=1 << 30, size=8192)
    findings.figure("rates", rates)
    for share, least in ((50, 0.35), (30, 0.18), (10, 0.05)):
        part = rates[share]["flop_s"] / rates[100]["flop_s"]
        findings.expect(f"{share} %: product about in proportion", least <= part <= share / 100 * 1.35, part)
    copied = rates[50]["copy_bytes_s"] / rates[100]["copy_bytes_s"]
    findings.expect("50 %: copies slow down less than products", copied > 0.6, copied)


def mps_faults(findings: Findings, is_dry_run: bool) -> None:
    """terminate_client on a spinning client, SIGKILL of another, a fault: neighbours, server, the pool outside MPS."""
    asyncio.run(_fault(findings))


async def _fault(findings: Findings) -> None:
    with Peer("driver") as owner:
        made = owner.ask("create", name="pool", num_bytes=SIZE)
        async with mps_daemon() as control:
            for name, end in (("terminate", _terminate), ("kill", _kill), ("fault", _read_nowhere)):
                started_at_s = time.monotonic()
                with mps_client(control, 40) as neighbour, mps_client(control, 30) as bad:
                    await _one_end(findings, control, made["fd"], name, end, neighbour, bad)
                text = f"after {name}"
                with mps_client(control, 50) as newcomer:
                    newcomer.ask("import", [made["fd"]], name="pool", num_bytes=SIZE)
                    seen = newcomer.ask("read", name="pool", num_bytes=9)
                    findings.expect(f"{text}: a newcomer works and finds the pool's bytes", seen == "the bytes", seen)
                states = [server.status for server in await control.servers()]
                findings.expect(f"{text}: the server is ACTIVE", states == [ServerStatus.ACTIVE], states)
                findings.figure(f"{name}_s", time.monotonic() - started_at_s)
        os.close(made["fd"])


async def _one_end(
    findings: Findings, control: MpsControl, fd: int, name: str, end: End, neighbour: Peer, bad: Peer
) -> None:
    for peer in (neighbour, bad):
        peer.tell("import", [fd], name="pool", num_bytes=SIZE)
    for peer in (neighbour, bad):
        peer.reply()
    neighbour.ask("write", name="pool", text="the bytes")
    server = await _server_of(control, bad)
    neighbour.tell("work", rounds=3000)
    await end(findings, control, server, bad)
    try:
        said = f"{neighbour.reply():.2f} s of work"
        unharmed = True
    except PeerError as error:
        said, unharmed = str(error)[:200], False
    if name == "terminate":
        findings.expect("terminate: the neighbour is unharmed", unharmed, said)
    else:
        findings.figure(f"{name}: the neighbour", said)
        findings.aim(f"{name}: the neighbour sees the fault", not unharmed, said)


async def _terminate(findings: Findings, control: MpsControl, server: int, bad: Peer) -> None:
    bad.ask("spin", cycles=SPIN_CYCLES)
    started_at_s = time.monotonic()
    done = await control.terminate_client(server, bad.pid)
    findings.expect("terminate_client succeeds", done, f"{time.monotonic() - started_at_s:.3f} s")
    try:
        bad.ask("wait")
        findings.expect("the terminated client gets an error", False)
    except PeerError as error:
        findings.expect("the terminated client gets an error", "terminated" in str(error), str(error)[:150])
    findings.expect("an unknown client is refused", not await control.terminate_client(server, 999_999))
    bad.kill()


async def _kill(findings: Findings, control: MpsControl, server: int, bad: Peer) -> None:
    bad.ask("spin", cycles=SPIN_CYCLES)
    bad.kill()
    await _see_fault(findings, control, "kill")


async def _read_nowhere(findings: Findings, control: MpsControl, server: int, bad: Peer) -> None:
    with contextlib.suppress(PeerError):
        bad.ask("fault")
    await _see_fault(findings, control, "fault")
    bad.kill()


async def _see_fault(findings: Findings, control: MpsControl, name: str) -> None:
    """Records whether the server is in FAULT within two seconds."""
    states: list[ServerStatus] = []
    for _ in range(40):
        states = [server.status for server in await control.servers()]
        if ServerStatus.FAULT in states:
            break
        await asyncio.sleep(0.05)
    findings.expect(f"{name}: the server is in FAULT while its clients live", ServerStatus.FAULT in states, states)


QUESTIONS = (
    "get_server_list", "get_server_status {server}", "get_client_list {server}", "ps",
    "get_default_active_thread_percentage", "get_active_thread_percentage {server}", "get_device_client_list",
    "terminate_client {server} 999999", "get_server_status 1", "get_client_list 1", "lspart", "sm_partition", "bogus",
)  # fmt: skip


def mps_answers(findings: Findings, is_dry_run: bool) -> None:
    """Raw answers of the control program, before a client and with one, to be kept as test data; and -S."""
    asyncio.run(_record(findings))


async def _record(findings: Findings) -> None:
    program = control_program()
    with TemporaryDirectory(prefix="mps-") as empty:
        findings.figure("no daemon", _raw(program, {PIPE_DIRECTORY: empty}, "get_server_list"))
    async with mps_daemon() as control:
        ask = {question: question.format(server=1) for question in QUESTIONS}
        findings.figure("no client", {name: _raw(program, control.environment, text) for name, text in ask.items()})
        with mps_client(control, 50) as client:
            client.ask("info")
            server = await _server_of(control, client)
            ask = {question: question.format(server=server) for question in QUESTIONS}
            answers = {name: _raw(program, control.environment, text) for name, text in ask.items()}
            findings.figure("one client", {"server": server, "client": client.pid, "answers": answers})
            findings.expect("the client is listed", any(client.pid in s.clients for s in await control.servers()))
        await asyncio.sleep(0.2)
        left = [server.clients for server in await control.servers()]
        findings.expect("and no more once it has exited", not any(left), left)
    usage = subprocess.run((program, "--help"), capture_output=True, text=True, timeout=20, check=False)
    findings.figure("usage", [usage.returncode, usage.stdout, usage.stderr])
    try:
        async with mps_daemon("-S") as control:
            words = ("lspart", "ps", "get_server_list")
            findings.figure("-S", {word: _raw(program, control.environment, word) for word in words})
    except Unavailable as error:
        findings.figure("-S", str(error))


def _raw(program: Path, environment: Mapping[str, str], text: str) -> dict[str, Any]:
    done = subprocess.run(
        program, input=f"{text}\n", env={**os.environ, **environment}, capture_output=True, text=True, timeout=20,
        check=False,
    )  # fmt: skip
    return {"rc": done.returncode, "out": done.stdout, "err": done.stderr}
