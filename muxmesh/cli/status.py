"""`muxmesh status`: prints the state of a mesh as tables or as JSON. It formats one GetStatusResponse."""

from __future__ import annotations

import argparse
import asyncio
import math
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from muxmesh.cli.common import print_json
from muxmesh.cli.mesh_client import client_of
from muxmesh.cli.text_table import print_table
from muxmesh.client import NO_RETRIES
from muxmesh.v1 import mesh_pb2

_MIB = 1024 * 1024


def run(arguments: argparse.Namespace) -> int:
    """Fetches the status and prints it; returns the exit code."""
    status = asyncio.run(_fetch(arguments))
    if arguments.json:
        print_json(message_dict(status))
    else:
        show(status)
    return 0


async def _fetch(arguments: argparse.Namespace) -> mesh_pb2.GetStatusResponse:
    async with client_of(arguments, arguments.address, NO_RETRIES) as client:
        return await client.status()


def show(status: mesh_pb2.GetStatusResponse) -> None:
    """Prints one table each for the models, the workers of each unit, and the processes."""
    redis = "connected" if status.redis_connected else "NOT CONNECTED"
    print(f"muxmesh {status.version}, Redis {redis}, order {status.order_policy}\n")
    print_table(
        (
            "MODEL",
            "WAITING",
            "RUNNING",
            "FINISHED",
            "ABORTED",
            "RESTARTS",
            "PROMPT TOKENS",
            "OUTPUT TOKENS",
            "PREDICTED TAU",
            "SLO MET",
            "RECENTLY",
        ),
        (
            (
                model.model,
                model.num_requests_waiting,
                model.num_requests_running,
                model.num_requests_finished,
                model.num_requests_aborted,
                model.num_restarts,
                model.prompt_tokens,
                model.output_tokens,
                _tau(model),
                _attainment(model.slo.total),
                _attainment(model.slo.recent),
            )
            for model in status.models
        ),
    )
    for unit in status.units:
        _print_unit(unit)
    print()
    print_table(
        ("PROCESS", "PID", "RESTARTS", "ADDRESS"),
        ((process.name, process.pid, process.num_restarts, process.address) for process in status.processes),
    )


def _print_unit(unit: mesh_pb2.UnitStatus) -> None:
    if not unit.connected:
        print(f"\nunit {unit.unit}: NOT CONNECTED")
        return
    pool = unit.pool
    print(
        f"\nunit {unit.unit} on {unit.device}: KV pool {pool.pool_bytes / _MIB:.0f} MiB, leased "
        f"{pool.leased_bytes / _MIB:.1f} MiB, cached {pool.cached_bytes / _MIB:.1f} MiB, {pool.num_free_slabs} of "
        f"{pool.num_slabs} slabs free, {pool.fragmented_bytes / _MIB:.1f} MiB fragmented"
    )
    print(
        f"memory shared by {unit.transport or 'unknown'}; {pool.num_handoffs} hand-offs, "
        f"{pool.kv_bytes_copied} bytes copied"
    )
    if pool.swap_bytes:
        copied = sum(worker.swap_out_bytes + worker.swap_in_bytes for worker in unit.workers)
        seconds = sum(worker.swap_s for worker in unit.workers)
        print(
            f"swap {pool.swap_used_bytes / _MIB:.1f} of {pool.swap_bytes / _MIB:.0f} MiB, {pool.num_swapped_leases} "
            f"leases swapped out, {copied / _MIB:.1f} MiB copied in {seconds:.2f} s"
        )
    if pool.num_leases_expired or pool.num_leases_orphaned:
        print(f"leases: {pool.num_leases_expired} expired, {pool.num_leases_orphaned} orphaned")
    print()
    print_table(
        ("MODEL", "STATE", "QUOTA MIB", "BLOCKS LEASED", "BLOCKS CACHED", "BLOCKS FREE", "PREFIX HITS", "WAITING"),
        (
            (
                model.model,
                model.state or "-",
                f"{model.quota_bytes / _MIB:.0f}",
                model.num_leased_token_blocks,
                model.num_cached_token_blocks,
                model.num_free_token_blocks,
                _percent(model.num_prefix_tokens_hit, model.num_prefix_tokens_queried),
                model.num_queued_requests,
            )
            for model in unit.models
        ),
    )
    if [one.tenant for one in unit.tenants] not in ([], [""]):  # the empty one: a mesh without API keys
        print()
        print_table(
            ("TENANT", "SERVICE S", "BANDS AHEAD", "WAITING", "LEASES"),
            (
                (one.tenant, f"{one.service_s:.1f}", one.num_bands_ahead, one.num_queued_requests, one.num_leases)
                for one in unit.tenants
            ),
        )
    print()
    print_table(
        ("WORKER", "PID", "READY", "LEASES", "STEPS", "TOKENS", "BUSY S"),
        (
            (
                worker.name,
                worker.pid,
                "yes" if worker.ready else "no",
                worker.num_leases,
                worker.num_steps,
                worker.num_computed_tokens,
                f"{worker.busy_s:.1f}",
            )
            for worker in unit.workers
        ),
    )


def _tau(model: mesh_pb2.RouterModelStatus) -> str:
    if not model.HasField("prediction_tau"):
        return "-"
    return f"{model.prediction_tau:.2f}" + ("" if model.predictions_used else ", not used")


def _attainment(tally: mesh_pb2.SloTally) -> str:
    """The share of the requests that met the SLO, rounded down: 100 % means that none missed it."""
    if not tally.num_requests:
        return "-"
    return f"{math.floor(1000 * tally.num_met / tally.num_requests) / 10:g} %"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "-"


def message_dict(message: Message) -> dict[str, Any]:
    """Converts a message to JSON content, with the field names of the proto. Fields without presence always appear.

    Fields of 64 bits are numbers, unlike in the JSON of protobuf: text compares with no number.
    """
    content: dict[str, Any] = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    _make_whole_numbers(content, message)
    return content


def _make_whole_numbers(content: dict[str, Any], message: Message) -> None:
    """Replaces in ``content`` what the JSON of protobuf has as text by the numbers of ``message``."""
    for name, value in content.items():
        number = getattr(message, name)
        if isinstance(value, dict):
            _make_whole_numbers(value, number)
        elif isinstance(value, list):
            for part, part_message in zip(value, number, strict=True):
                if isinstance(part, dict):
                    _make_whole_numbers(part, part_message)
        elif isinstance(value, str) and value == str(number) and isinstance(number, int):
            content[name] = number
