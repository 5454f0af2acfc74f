"""The engine on the card: graphs, and streams limited by green contexts."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
from typing import Any

from benchmarks.gpu.mps_daemon import mps_client, mps_daemon
from benchmarks.gpu.peer import Peer
from benchmarks.gpu_check.check import Findings
from muxmesh.cuda.mps import MpsControl

LOAD: dict[str, Any] = {"pool_tokens": 65_536, "max_num_seqs": 16, "step_tokens": 512, "max_len": 2048}
DRY_LOAD: dict[str, Any] = {"pool_tokens": 1024, "max_num_seqs": 2, "step_tokens": 64, "max_len": 128}


def graphs(findings: Findings, is_dry_run: bool) -> None:
    """Decode with and without graphs: the same greedy tokens in f32; times in bf16 at batch 1 and 16."""
    sizes = {**(DRY_LOAD if is_dry_run else LOAD), "model": "tiny" if is_dry_run else "small"}
    with Peer("engine") as with_graphs, Peer("engine") as without:
        peers = {"with": with_graphs, "without": without}
        tokens = {}
        for name, peer in peers.items():
            peer.tell("load", **sizes, dtype="float32", graphs=name == "with", max_steps=1)
        for name, peer in peers.items():
            findings.figure(f"load {name}", peer.reply())
            batch, count = (2, 4) if is_dry_run else (8, 48)
            tokens[name] = peer.ask("generate", batch=batch, prompt_tokens=20, num_tokens=count)
        findings.expect("greedy tokens are the same", tokens["with"] == tokens["without"])
        findings.figure("distinct tokens", len({token for output in tokens["with"] for token in output}))
        for name, peer in peers.items():
            peer.ask("load", **sizes, dtype="bfloat16", graphs=name == "with", max_steps=4)
        for batch in (1, 2) if is_dry_run else (1, 16):
            _compare(findings, peers, batch, is_dry_run)


def _compare(findings: Findings, peers: dict[str, Peer], batch: int, is_dry_run: bool) -> None:
    step: dict[str, Any] = {"batch": batch, "context": 64 if is_dry_run else 512, "count": 1 if is_dry_run else 40}
    times = {name: peer.ask("decode", num_steps=1, **step) for name, peer in peers.items()}
    runs = peers["with"].ask("decode", num_steps=4, **step)
    findings.figure(f"batch {batch}", {name: one["ms"] for name, one in times.items()} | {"4 steps": runs["ms"]})
    findings.expect(
        f"batch {batch}: tokens in bf16 are the same", times["with"]["tokens"] == times["without"]["tokens"]
    )
    first = [tokens[0] for tokens in runs["tokens"]]
    findings.expect(f"batch {batch}: and in runs of 4 steps", first == [one[0] for one in times["with"]["tokens"]])
    if not is_dry_run:
        ratio = times["without"]["ms"] / times["with"]["ms"]
        findings.expect(f"batch {batch}: a step is faster with graphs", ratio > 1, ratio)


ATTENTION_CASES = [(batch, context) for batch in (1, 4, 16, 64) for context in (512, 2048, 8192)]
LEAST_BYTES = {"has to": 256 << 20, "should": 64 << 20}
"""What a case reads at least: one that reads less is dominated by what a launch costs."""


def attention(findings: Findings, is_dry_run: bool) -> None:
    """Decode attention on scattered blocks over the copy ceiling, at batch 1 to 64 and contexts up to 8192."""
    with Peer("engine") as peer:
        ceiling = peer.ask("ceilings", copied_bytes=4 << 30, size=8192)
        findings.figure("ceilings", ceiling)
        for heads in ((32, 8, 128), (32, 8, 64)):
            name = f"{heads[0]} heads, {heads[1]} KV heads of {heads[2]}"
            cases = peer.ask("attention", heads=heads, pool_tokens=64 * 8192, cases=ATTENTION_CASES)
            for case in cases:
                case["of_copy"] = case["bytes_s"] / ceiling["copy_bytes_s"]
            findings.figure(name, cases)
            for how, judge in (("has to", findings.expect), ("should", findings.aim)):
                large = [case for case in cases if case["bytes_s"] * case["us"] / 1e6 >= LEAST_BYTES[how]]
                slowest = min(large, key=lambda case: case["of_copy"])
                what = f"{name}: {LEAST_BYTES[how] >> 20} MiB and more at over 0.7 of the copy ceiling"
                judge(what, slowest["of_copy"] > 0.7, slowest)


def green(findings: Findings, is_dry_run: bool) -> None:
    """Products on green streams of 32 and 64 SMs, enqueued and from a graph, outside MPS and as a client of it.

    Two clients beside each other have SMs of their own.
    """
    asyncio.run(_green(findings))


async def _green(findings: Findings) -> None:
    shares = (100, 49, 25)
    with contextlib.ExitStack() as stack:
        outside = {share: stack.enter_context(Peer("torch")) for share in shares}
        async with mps_daemon() as control:
            inside = {share: stack.enter_context(mps_client(control, 100)) for share in shares}
            for place, peers in (("alone", outside), ("under MPS", inside)):
                for share, peer in peers.items():
                    peer.ask("green", shares=[share], index=0)
                times = {s: peer.ask("product_times", size=4096, count=50) for s, peer in peers.items()}
                findings.figure(place, times)
                for share in shares[1:]:
                    _in_proportion(findings, f"{place}, {share} %", times[share], times[100])
            for peer in inside.values():
                peer.close()
            _beside_each_other(findings, control)


def _beside_each_other(findings: Findings, control: MpsControl) -> None:
    """Clients whose shares fit beside each other do not take turns on the same SMs."""
    shares = (40, 30)
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(mps_client(control, 100)) for _ in shares]
        for index, peer in enumerate(peers):
            peer.ask("green", shares=shares, index=index)
        alone = [peer.ask("product_times", size=4096, count=200) for peer in peers]
        for peer in peers:
            peer.tell("product_times", size=4096, count=200)
        together = [peer.reply() for peer in peers]
    for share, one, beside in zip(shares, alone, together, strict=True):
        slower = beside["plain_ms"] / one["plain_ms"]
        findings.expect(f"{share} %: hardly slower beside the other client", slower < 1.5, slower)


def _in_proportion(findings: Findings, name: str, part: dict[str, float], whole: dict[str, float]) -> None:
    sms = whole["num_sms"] / part["num_sms"]
    for way in ("plain_ms", "graph_ms"):
        slower = part[way] / whole[way]
        holds = 0.6 * sms < slower < 1.4 * sms
        findings.expect(f"{name}: {way} in proportion to 1 / SMs ({part['num_sms']} SMs)", holds, slower)


SANITIZED = (
    "tests/muxmesh/engine/native/cuda/test_row_kernels.py",
    "tests/muxmesh/engine/native/cuda/test_attention.py::test_a_split_context_is_merged",
    "tests/muxmesh/engine/native/cuda/test_attention.py::test_ragged_chunks_begin_anywhere_in_their_contexts",
)
SANITIZERS = ("/usr/local/cuda/bin/compute-sanitizer", "/usr/local/cuda/compute-sanitizer/compute-sanitizer")


def sanitizer(findings: Findings, is_dry_run: bool) -> None:
    """The accesses of the kernels that write KV and attend to it, in some of their tests, under memcheck."""
    program = shutil.which("compute-sanitizer") or next((one for one in SANITIZERS if os.path.exists(one)), None)
    findings.expect("this machine has compute-sanitizer", program is not None, program)
    if program is None:
        return
    command = (
        program, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q", "-W", "default",
        *SANITIZED,
    )  # fmt: skip
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "0", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    findings.expect("no error", done.returncode == 0, (done.stdout + done.stderr)[-1500:] if done.returncode else "")
