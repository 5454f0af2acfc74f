"""A small unit with three models of different shapes."""

from __future__ import annotations

from kvstore.model_states import NO_LIMITS, AwakeLimits
from kvstore.unit import AdmissionDecisions, Unit
from kvstore.unit_model import UnitModel
from muxmesh.models.model_spec import KvShape
from muxmesh.types import KvDemand, Lease, QueuedRequest, Role, SchedulingState

SHAPES = {
    "a": KvShape(num_layers=2, num_kv_heads=1, head_dim=16, block_size=8, dtype_bytes=4),
    "b": KvShape(num_layers=3, num_kv_heads=2, head_dim=32, block_size=16, dtype_bytes=4),
    "c": KvShape(num_layers=1, num_kv_heads=4, head_dim=64, block_size=16, dtype_bytes=4),
}
SLAB_BYTES = 64 * 1024


def make_unit(num_slabs: int = 4, max_num_seqs: int = 3, swap_bytes: int = 0, awake: AwakeLimits = NO_LIMITS) -> Unit:
    return Unit(
        num_slabs * SLAB_BYTES,
        SLAB_BYTES,
        {name: UnitModel(shape, max_num_seqs, 512) for name, shape in SHAPES.items()},
        swap_bytes=swap_bytes,
        awake=awake,
    )


def slab_tokens(unit: Unit, model: str) -> int:
    """Tokens of one sequence that fill a slab."""
    return unit.pool.blocks_per_slab(model) * SHAPES[model].block_size


def attach_ready(unit: Unit, model: str) -> tuple[str, str]:
    """Names of a new prefill and a new decode worker, both ready."""
    names = []
    for role in (Role.PREFILL, Role.DECODE):
        worker = unit.attach(role, model, f"unix:{role}", 1)
        worker.ready = True
        names.append(worker.name)
    return names[0], names[1]


def queued(
    entry_id: int,
    model: str = "a",
    num_tokens: int = 8,
    priority: int = 0,
    arrived_at_s: float = 0.0,
    hashes: tuple[bytes, ...] = (),
    max_cached_tokens: int = 0,
) -> QueuedRequest:
    demand = KvDemand(num_tokens, num_tokens, hashes, max_cached_tokens)
    return QueuedRequest(entry_id, model, SchedulingState(priority, arrived_at_s), demand)


def schedule(unit: Unit, now_s: float = 0.0) -> AdmissionDecisions:
    return unit.schedule(now_s, now_s)


def admitted_ids(unit: Unit, now_s: float = 0.0) -> list[int]:
    """Schedules; entry ids of the requests that got a credit."""
    return [issued.entry_id for issued in schedule(unit, now_s).credits]


def decoding(
    unit: Unit, entry_id: int, num_tokens: int, model: str = "a", arrived_at_s: float = 0.0
) -> tuple[Lease, str]:
    """A resident lease after its hand-off, and the decode worker that owns it."""
    prefill, decode = (unit.ready_workers(role, model)[0] for role in Role)
    unit.offer("router", queued(entry_id, model, num_tokens, arrived_at_s=arrived_at_s))
    (issued,) = schedule(unit).credits
    acquired = unit.acquire(issued.lease.ref, prefill.name)
    return unit.move(acquired.ref, prefill.name, decode.name, num_tokens - 1, (1,)), decode.name
