"""Which workers can take one more sequence, and which of them it goes to."""

from collections import Counter
from dataclasses import dataclass

import pytest

from kvstore.worker_slots import WorkerRecord, WorkerSlots, ready_workers
from muxmesh.batch_choice import Reach
from muxmesh.scheduling_policy import FCFS, SchedulingPolicy
from muxmesh.types import Role, SchedulingState


@dataclass(frozen=True)
class Limits:
    max_num_seqs: int = 2
    resident_limit: int = 2


def worker(name: str, role: Role, model: str = "m", ready: bool = True) -> WorkerRecord:
    return WorkerRecord(name, role, model, f"unix:{name}", 1, ready)


ANY = SchedulingState(0, 0.0)
PREFILL, DECODE = worker("p1", Role.PREFILL), worker("d1", Role.DECODE)


def slots(
    *workers: WorkerRecord, limits: Limits | None = None, batched: str = "", resident: str | None = None
) -> WorkerSlots:
    """``batched``: names of workers, one for each of their sequences; ``resident``: None means the same."""
    counted = Counter(batched.split())
    counted_resident = Counter((batched if resident is None else resident).split())
    return WorkerSlots(
        workers,
        {"m": limits or Limits(), "other": Limits()},
        counted,
        counted_resident,
        lambda worker: Reach({}, FCFS, 0.0),
    )


@pytest.mark.parametrize(
    "workers",
    [
        [],
        [PREFILL],
        [DECODE],
        [PREFILL, worker("d1", Role.DECODE, ready=False)],
        [PREFILL, worker("d1", Role.DECODE, "other")],
    ],
    ids=["none", "no decode", "no prefill", "decode is not ready", "decode of another model"],
)
def test_a_model_needs_a_ready_worker_of_each_role(workers: list[WorkerRecord]) -> None:
    assert not slots(*workers).has_slot("m", ANY)


def test_a_full_decode_worker_takes_no_sequence() -> None:
    assert slots(PREFILL, DECODE, batched="d1").has_slot("m", ANY)
    assert not slots(PREFILL, DECODE, batched="d1 d1").has_slot("m", ANY)


def test_a_busy_prefill_worker_still_takes_sequences() -> None:
    assert slots(PREFILL, DECODE, batched="p1 p1 p1").has_slot("m", ANY), "prompts wait in its engine"


def test_free_slots_are_those_that_paused_sequences_do_not_take() -> None:
    limits = Limits(max_num_seqs=3, resident_limit=5)
    assert slots(PREFILL, DECODE, limits=limits, batched="d1", resident="d1 d1").has_slot("m", ANY)
    assert not slots(PREFILL, DECODE, limits=limits, batched="d1", resident="d1 d1 d1").has_slot("m", ANY)


def test_a_swapped_lease_needs_a_slot_of_its_own_worker() -> None:
    second = worker("d2", Role.DECODE)
    both = slots(PREFILL, DECODE, second, batched="d1 d1")
    assert both.has_slot("m", ANY)
    assert not both.has_slot("m", ANY, "d1")
    assert both.has_slot("m", ANY, "d2")


def test_the_least_loaded_workers_are_chosen() -> None:
    prefills = [worker("p1", Role.PREFILL), worker("p2", Role.PREFILL)]
    decodes = [worker("d1", Role.DECODE), worker("d2", Role.DECODE)]
    chosen = slots(*prefills, *decodes, batched="p2 d1").choose("m", ANY)
    assert [one.name for one in chosen] == ["p1", "d2"]


def test_the_youngest_of_equally_loaded_workers_is_chosen() -> None:
    chosen = slots(PREFILL, worker("p2", Role.PREFILL), DECODE, worker("d2", Role.DECODE)).choose("m", ANY)
    assert [one.name for one in chosen] == ["p2", "d2"]


def test_a_worker_without_a_free_slot_is_not_chosen_however_small_its_batch() -> None:
    limits = Limits(max_num_seqs=5, resident_limit=2)
    chosen = slots(PREFILL, DECODE, worker("d2", Role.DECODE), limits=limits, batched="d1", resident="d1 d2 d2").choose(
        "m", ANY
    )
    assert chosen[1].name == "d1", "d2 has paused sequences only, but too many"


def test_a_taken_slot_counts_for_the_next_sequence() -> None:
    free = slots(PREFILL, DECODE, worker("d2", Role.DECODE))
    names = []
    while free.has_slot("m", ANY):
        prefill, decode = free.choose("m", ANY)
        free.take(prefill.name, decode.name)
        names.append(decode.name)
    assert names == ["d2", "d1", "d2", "d1"]


def test_ready_workers_are_of_the_role_and_model_the_youngest_first() -> None:
    workers = [DECODE, PREFILL, worker("d2", Role.DECODE), worker("d3", Role.DECODE, ready=False)]
    assert [one.name for one in ready_workers(workers, Role.DECODE, "m")] == ["d2", "d1"]
    assert ready_workers(workers, Role.DECODE, "other") == []


# Displacing sequences from a full batch


SRTF = SchedulingPolicy("srtf", 0.0, 0.0, 1.0)
FOUR_SLOTS = Limits(max_num_seqs=4, resident_limit=8)


@dataclass(frozen=True)
class Held:
    """A sequence that worker d1 computes."""

    scheduling: SchedulingState
    is_batched: bool = True
    num_preemptions: int = 0
    is_protected: bool = False


def state(remaining_s: float, priority: int = 0) -> SchedulingState:
    return SchedulingState(priority, 0.0, decode_s=remaining_s)


def held(*sequences: Held, num_paused: int = 0, num_in_prefill: int = 0, limits: Limits = FOUR_SLOTS) -> WorkerSlots:
    """Workers p1 and d1, which computes ``sequences``."""
    num_batched = len(sequences) + num_in_prefill
    batched, resident = Counter(d1=num_batched), Counter(d1=num_batched + num_paused)
    of_worker = {"d1": Reach(dict(enumerate(sequences)), SRTF, 0.0)}
    return WorkerSlots((PREFILL, DECODE), {"m": limits}, batched, resident, of_worker.__getitem__)


def test_a_full_worker_takes_a_sequence_that_would_displace_another() -> None:
    full = held(*[Held(state(10.0))] * 4)
    assert full.has_slot("m", state(4.9))
    assert not full.has_slot("m", state(5.0))
    assert full.has_slot("m", state(500.0, priority=-1))


def test_sequences_that_are_admitted_before_they_displace_need_a_victim_each() -> None:
    slots = held(Held(state(10.0)), Held(state(1.0)), Held(state(1.0)), Held(state(1.0)))
    assert slots.has_slot("m", state(2.0))
    slots.take("p1", "d1")
    assert not slots.has_slot("m", state(2.0)), "it has one victim, which is taken"
    assert slots.has_slot("m", state(0.4)), "it has four"


def test_at_most_half_of_a_batch_is_to_be_displaced_at_once() -> None:
    slots, num_taken = held(*[Held(state(10.0))] * 4), 0
    while slots.has_slot("m", state(1.0)):
        slots.take("p1", "d1")
        num_taken += 1
    assert num_taken == 2


def test_the_order_ends_where_none_that_is_later_has_a_slot() -> None:
    full = held(*[Held(state(10.0))] * 4)
    assert not full.ends_before("m", SRTF.sort_key(state(4.9), 0.0))
    assert not full.ends_before("m", SRTF.sort_key(state(9.9), 0.0)), "it looks at the order only"
    assert full.ends_before("m", SRTF.sort_key(state(10.0), 0.0))
    assert not full.ends_before("m", SRTF.sort_key(state(10.0, priority=-1), 0.0))
    for _ in range(2):
        full.take("p1", "d1")
    assert full.ends_before("m", SRTF.sort_key(state(1.0), 0.0)), "half of the batch is to be displaced"
    assert not held(Held(state(10.0))).ends_before("m", SRTF.sort_key(state(99.0), 0.0)), "a slot is free"
    assert slots(DECODE).ends_before("m", SRTF.sort_key(state(1.0), 0.0)), "there is no prefill worker"


def test_sequences_in_prefill_are_not_displaced() -> None:
    assert not held(num_in_prefill=4).has_slot("m", state(1.0))


def test_without_memory_for_paused_sequences_none_is_displaced() -> None:
    full = held(*[Held(state(10.0))] * 4, limits=Limits(max_num_seqs=4, resident_limit=4))
    assert not full.has_slot("m", state(1.0, priority=-1))


def test_a_free_slot_belongs_to_a_paused_sequence() -> None:
    """The worker gives it the slot at once, since a new sequence has to be prefilled first."""
    computing = Held(state(6.0))
    assert not held(computing, computing, computing, num_paused=1).has_slot("m", state(5.0))
    assert held(computing, computing, computing, num_paused=1).has_slot("m", state(2.0)), "it displaces another one"
    assert held(computing, computing, num_paused=1).has_slot("m", state(7.0)), "there are two"
