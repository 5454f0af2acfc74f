"""Device memory between processes, on the real driver: descriptors, legacy IPC, imports into torch, pinned memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

from benchmarks.gpu.peer import Peer, PeerError
from benchmarks.gpu_check.check import Findings

SIZE = 64 << 20
LAST = SIZE - 16


def ipc(findings: Findings, is_dry_run: bool) -> None:
    """VMM memory by descriptor and plain memory by IPC handle, between three processes, both ways, with both killed."""
    with contextlib.ExitStack() as stack:
        owner, first, second = (stack.enter_context(Peer("driver")) for _ in range(3))
        findings.figure("device", owner.ask("info"))
        made = owner.ask("create", name="pool", num_bytes=SIZE)
        for peer in (first, second):
            peer.ask("import", [made["fd"]], name="pool", num_bytes=SIZE)
            peer.ask("map", name="pool")
        findings.expect("new memory reads as zeros", first.ask("read", name="pool", num_bytes=4) == "\0" * 4)
        first.ask("write", name="pool", text="from the first")
        seen = second.ask("read", name="pool", num_bytes=14)
        findings.expect("the second importer reads what the first wrote", seen == "from the first", seen)
        second.ask("write", name="pool", text="from the second!", offset=LAST)
        seen = first.ask("read", name="pool", num_bytes=16, offset=LAST)
        findings.expect("and the first what the second wrote, at the end", seen == "from the second!", seen)
        owner.kill()
        seen = first.ask("read", name="pool", num_bytes=14)
        findings.expect("memory outlives its owner", seen == "from the first", seen)
        late = stack.enter_context(Peer("driver"))
        late.ask("import", [made["fd"]], name="pool", num_bytes=SIZE)
        late.ask("map", name="pool")
        seen = late.ask("read", name="pool", num_bytes=14)
        findings.expect("the descriptor is imported after its owner's death", seen == "from the first", seen)
        first.kill()
        seen = second.ask("read", name="pool", num_bytes=14)
        findings.expect("memory outlives an importer", seen == "from the first", seen)
        os.close(made["fd"])
        for operation, arguments in (("unmap", {"name": "pool"}), ("create", {"name": "new", "num_bytes": SIZE})):
            second.ask(operation, **arguments)
    _legacy(findings)


def _legacy(findings: Findings) -> None:
    with contextlib.ExitStack() as stack:
        owner, other = (stack.enter_context(Peer("driver")) for _ in range(2))
        handle = owner.ask("allocate", name="plain", num_bytes=SIZE)
        owner.ask("write", name="plain", text="plain memory")
        other.ask("open", name="plain", handle=handle)
        seen = other.ask("read", name="plain", num_bytes=12)
        findings.expect("plain memory is read through its IPC handle", seen == "plain memory", seen)
        other.ask("write", name="plain", text="written back")
        seen = owner.ask("read", name="plain", num_bytes=12)
        findings.expect("and written", seen == "written back", seen)
        findings.expect(
            "a process cannot open its own handle",
            *_refusal(lambda: owner.ask("open", name="own", handle=handle), "201"),
        )
        other.ask("close", name="plain")


def _refusal(attempt: Callable[[], Any], code: str) -> tuple[bool, str]:
    """Whether ``attempt`` fails with this code of the driver, and what it said."""
    try:
        attempt()
    except PeerError as error:
        return f"({code})" in str(error), str(error)
    return False, "accepted"


def dlpack(findings: Findings, is_dry_run: bool) -> None:
    """A worker's mapping of imported memory is a torch tensor at the same address, written and read without a copy."""
    with contextlib.ExitStack() as stack:
        owner, first = stack.enter_context(Peer("driver")), stack.enter_context(Peer("torch"))
        second = stack.enter_context(Peer("torch"))
        made = owner.ask("create", name="pool", num_bytes=SIZE)
        for peer in (first, second):
            peer.tell("import", [made["fd"]], name="pool", num_bytes=SIZE)
        for name, peer in (("first", first), ("second", second)):
            seen = peer.reply()
            findings.expect(f"{name}: the tensor has the mapping's address", seen["same_address"], seen)
            device = "cpu" if is_dry_run else "cuda:0"
            findings.expect(f"{name}: and is on the device", seen["device"] == device, seen["device"])
        first.ask("write_bf16", name="pool", value=1.5, count=4096)
        seen = second.ask("sum_bf16", name="pool", count=4096)
        findings.expect("bf16 written by one is read by the other", seen == 1.5 * 4096, seen)
        owner.kill()
        first.kill()
        seen = second.ask("sum_bf16", name="pool", count=4096)
        findings.expect("and also when owner and writer are dead", seen == 1.5 * 4096, seen)
        os.close(made["fd"])


def memfd(findings: Findings, is_dry_run: bool) -> None:
    """Copies to and from a registered memfd, alone and beside products, against plain pinned memory."""
    with Peer("torch") as peer:
        rates = peer.ask("memfd", num_bytes=1 << 30)
        findings.figure("rates", rates)
        for way in ("out", "in"):
            part = rates[f"registered_{way}_gb_s"] / rates[f"pinned_{way}_gb_s"]
            findings.expect(f"copies {way} run near the speed of plain pinned memory", part > 0.8, part)
        beside = peer.ask("memfd_beside", size=8192)
        findings.figure("beside products", beside)
        slowed = beside["out_gb_s_beside"] / rates["registered_out_gb_s"]
        findings.expect("copies beside products keep most of their speed", slowed > 0.5, slowed)
        findings.expect("products beside copies keep theirs", beside["product_time_ratio"] < 1.3, beside)
