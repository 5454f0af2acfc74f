"""A mesh under 1.2 and 3 times the load that it can serve, for two minutes each: real processes, the sim engine.

Clients send at random times (Poisson) whether or not earlier requests have ended. One that is refused comes back once
after the delay that `RetryInfo` names, with its ticket. Shown: how long admitted requests waited, how fast refusals
came, whether delays were true, and how many of those with a ticket got in.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import time
from dataclasses import dataclass, field

import grpc
import uvloop

from benchmarks.mesh_process import UpProcess, up
from benchmarks.report import OUT, Report
from benchmarks.shared_device.outcome import percentile
from muxmesh.client.call_metadata import ticket_metadata
from muxmesh.errors import MeshError, Overloaded
from muxmesh.rpc.status_codes import from_rpc_error
from muxmesh.v1 import inference_pb2, inference_pb2_grpc

SLOTS, OUTPUT_TOKENS, STEP_S = 16, 20, 0.02
CAPACITY = SLOTS / (OUTPUT_TOKENS * STEP_S)
"""Requests a second, at most."""
WAIT_BOUND_S = 20.0
LOADS = (1.2, 3.0)
SEED = 1
REQUEST = inference_pb2.GenerateRequest(
    model="sim",
    text="Hello",
    stopping=inference_pb2.StoppingOptions(max_new_tokens=OUTPUT_TOKENS, ignore_eos=True),
)


@dataclass
class Outcome:
    """What became of all requests of one load."""

    waits_s: list[float] = field(default_factory=list)
    refused_within_s: list[float] = field(default_factory=list)
    num_first_admitted: int = 0
    num_first_refused: int = 0
    num_holders_admitted: int = 0
    num_holders_refused: int = 0
    others: list[str] = field(default_factory=list)


async def send(stub: inference_pb2_grpc.InferenceAsyncStub, outcome: Outcome, error: Overloaded | None = None) -> None:
    """One request; a refused one comes back once."""
    started_s = time.monotonic()
    try:
        wait_s = await first_token_s(stub, () if error is None else ticket_metadata(error))
    except Overloaded as refused:
        outcome.refused_within_s.append(time.monotonic() - started_s)
        if error is not None:
            outcome.num_holders_refused += 1
            return
        outcome.num_first_refused += 1
        await asyncio.sleep(refused.retry_after_s)
        await send(stub, outcome, refused)
    except MeshError as failed:
        outcome.others.append(f"{type(failed).__name__}: {failed}")
    else:
        outcome.waits_s.append(wait_s)
        if error is None:
            outcome.num_first_admitted += 1
        else:
            outcome.num_holders_admitted += 1


async def first_token_s(stub: inference_pb2_grpc.InferenceAsyncStub, metadata: tuple[tuple[str, str], ...]) -> float:
    """Seconds until the first token of a request, which is read to its end. Raises the error of the mesh."""
    started_s, first_s = time.monotonic(), math.nan
    try:
        async for _ in stub.GenerateStream(REQUEST, metadata=metadata):
            first_s = time.monotonic() - started_s if math.isnan(first_s) else first_s
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error
    return first_s


async def run(mesh: UpProcess, load: float, seconds: float) -> Outcome:
    """Sends for ``seconds``; returns when all requests have ended."""
    outcome, rng = Outcome(), random.Random(SEED)
    async with grpc.aio.insecure_channel(mesh.address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        started_s, due_s, tasks = time.monotonic(), 0.0, []
        while due_s < seconds:
            due_s += rng.expovariate(load * CAPACITY)
            await asyncio.sleep(max(0.0, started_s + due_s - time.monotonic()))
            tasks.append(asyncio.create_task(send(stub, outcome)))
        await asyncio.gather(*tasks)
    return outcome


def report_load(report: Report, load: float, outcome: Outcome, seconds: float) -> None:
    """Adds the bars of one load."""
    name, holders = f"{load:g}x", outcome.num_holders_admitted + outcome.num_holders_refused
    longest = max(outcome.waits_s)
    report.bar(f"{name}: admitted at once", outcome.num_first_admitted)
    report.bar(f"{name}: refused, and back with a ticket", holders)
    share = outcome.num_holders_admitted / holders
    report.bar(f"{name}: of those with a ticket, admitted", share, ">= 0.95", share >= 0.95)
    is_bounded = longest <= WAIT_BOUND_S
    report.bar(f"{name}: longest wait for the first token, s", longest, f"<= {WAIT_BOUND_S:g}", is_bounded)
    report.bar(f"{name}: p99 of the seconds until a refusal", percentile(outcome.refused_within_s, 99))
    served = len(outcome.waits_s) / (CAPACITY * seconds)
    report.bar(f"{name}: served, of the nominal capacity", served)
    report.bar(f"{name}: other errors", len(outcome.others), "0", not outcome.others)
    report.figures[name] = {**vars(outcome), "waits_s": sorted(outcome.waits_s)[-100:], "refused_within_s": None}


async def main() -> int:
    """Runs the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0)
    arguments = parser.parse_args()
    model = {"name": "sim", "engine": "sim", "max_num_seqs": SLOTS, "sim": {"base_s": STEP_S}}
    config = {
        "units": [{"kv_pool": "256MiB", "models": [model]}], "router": {"log_requests": False},
        "order": {"wait_bound_s": WAIT_BOUND_S},
    }  # fmt: skip
    OUT.mkdir(parents=True, exist_ok=True)
    path, report = OUT / "overload.yaml", Report("overload")
    path.write_text(json.dumps(config))
    for load in LOADS:
        async with up("-c", str(path)) as mesh:
            report_load(report, load, await run(mesh, load, arguments.seconds), arguments.seconds)
    return 0 if report.write() else 1


if __name__ == "__main__":
    raise SystemExit(uvloop.run(main()))
