"""`python -m muxmesh.profiler.timer_process`: times steps of one model on one share of the device.

    --runtime FILE --unit NAME --model NAME --parent PID

Builds what a worker of the model builds, in memory of its own: no kvstore and no other worker takes part. Reads one
request in a line from stdin and writes one reply in a line to stdout, both JSON:

    {"cell": [role, batch, length], "repeats": N, "longest_s": S}    {"seconds": [...]}
    {"cell": [role, batch, length], "from_s": S, "until_s": S}       {"intervals": [[start, end], ...]}

The first line is {"ready": true, ...} with what the driver reports of the share of a GPU; what prevents a reply is
{"error": "..."}. Ends with stdin.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from muxmesh.clock import SystemClock
from muxmesh.config.runtime import MeshRuntime, ProcessKey
from muxmesh.cuda.sm_groups import joining
from muxmesh.device.device_pool import DevicePool
from muxmesh.errors import MeshError
from muxmesh.lifecycle import configure_logging, service_arguments
from muxmesh.models.prepared_model import model_spec
from muxmesh.profiler.step_timer import StepTimer
from muxmesh.profiler.timer_memory import HostTimerMemory, cuda_timer_memory
from muxmesh.scheduling_policy import FCFS
from muxmesh.types import Role
from worker.attachment import open_worker_device
from worker.engine_builder import build_pacer, build_runner, build_scheduler
from worker.share_pacer import SharePacer
from worker.worker_process import set_up_threads


def main() -> None:
    """Replies until stdin ends."""
    arguments = service_arguments(__doc__, "unit", "model", optional={"beside": "shares of processes beside it, JSON"})
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not be read as a reply

    def reply(content: Mapping[str, Any]) -> None:
        print(json.dumps(content), file=replies, flush=True)

    try:
        configure_logging(logging.WARNING, "text", f"profile/{arguments.model}")
        beside = json.loads(arguments.beside or "[]")
        timers, facts = open_timers(MeshRuntime.read(arguments.runtime), arguments.unit, arguments.model, beside)
    except (MeshError, OSError) as error:
        reply({"error": str(error)})
        return
    reply({"ready": True, **facts})
    for line in sys.stdin:
        try:
            reply(_reply_to(timers, json.loads(line)))
        except MeshError as error:
            reply({"error": str(error)})


def open_timers(
    runtime: MeshRuntime, unit_name: str, model_name: str, beside: Sequence[int] = ()
) -> tuple[Mapping[Role, StepTimer], dict[str, Any]]:
    """Builds and loads what times the steps of each role.

    ``beside``: shares of the processes of the profile that compute at the same time and were started before.
    Also returns what the driver reports of a GPU: the SMs that this process may use, and whether it is a client of MPS.
    Both workers of the model have the same share in ``runtime``, so of models that compute, both roles have one runner.
    Raises MeshError if the model cannot be loaded.
    """
    key = ProcessKey(Role.DECODE, unit_name, model_name)
    unit, config = runtime.model(unit_name, model_name)
    set_up_threads(runtime, key)
    runtime.set_environment(key, os.environ, has_supervisor=False)  # before the driver or torch is loaded
    prepared = runtime.prepared_model(unit_name, model_name)
    spec = model_spec(prepared.folder)
    shape = spec.kv_shape(config.block_size, config.kv_dtype)
    facts: dict[str, Any] = {}
    memory = None
    pool: DevicePool
    weights = None
    if unit.is_cuda:
        share = unit.green_share(config, Role.DECODE)
        device = open_worker_device(share and joining(share.percent, beside))
        info = device.segments.device
        facts = {"num_sms": info.num_sms, "mps": info.is_mps_client}
        pool, weights = cuda_timer_memory(unit, config, prepared, shape, device.torch)
    else:
        memory = HostTimerMemory(unit)
        pool = memory.pool

    def timer_of(role: Role) -> StepTimer:
        runner = build_runner(config, prepared, pool, weights, role)
        runner.load()
        pacer = build_pacer(config, role, unit.is_cuda)
        pause = None if pacer is None else functools.partial(_pause, pacer)

        def fill(num_blocks: int) -> None:
            if memory is not None and config.engine != "sim" and memory.fill(shape, num_blocks) and pacer is not None:
                pacer.restart()  # the CPU time of filling is not that of steps

        max_model_len = config.max_model_len or spec.context_len
        scheduler = build_scheduler(config, prepared, FCFS)
        return StepTimer(scheduler, runner, config.block_size, max_model_len, SystemClock(), fill, pause)

    if config.engine == "sim":  # its roles differ in how a share slows them down
        return {role: timer_of(role) for role in Role}, facts
    return dict.fromkeys(Role, timer_of(Role.DECODE)), facts


def _pause(pacer: SharePacer) -> None:
    """Waits as `ComputeGrant` does before a step."""
    while (delay_s := pacer.delay_s(SystemClock().monotonic_s(), time.process_time())) > 0:
        time.sleep(delay_s)


def _reply_to(timers: Mapping[Role, StepTimer], request: Mapping[str, Any]) -> dict[str, Any]:
    role, batch, length = request["cell"]
    timer = timers[Role(role)]
    if "repeats" in request:
        return {"seconds": timer.samples(Role(role), batch, length, request["repeats"], request["longest_s"])}
    return {"intervals": timer.intervals(Role(role), batch, length, request["from_s"], request["until_s"])}


if __name__ == "__main__":
    main()
