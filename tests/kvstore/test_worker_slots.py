"""Which workers can take one more sequence, and which of them it goes to."""

from collections import Counter
from dataclasses import dataclass

import pytest

from kvstore.worker_slots import WorkerRecord, WorkerSlots, ready_workers
from muxmesh.types import Role


@dataclass(frozen=True)
class Limits:
    max_num_seqs: int = 2
    resident_limit: int = 2


def worker(name: str, role: Role, model: str = "m", ready: bool = True) -> WorkerRecord:
    return WorkerRecord(name, role, model, f"unix:{name}", 1, ready)


PREFILL, DECODE = worker("p1", Role.PREFILL), worker("d1", Role.DECODE)


def slots(
    *workers: WorkerRecord, limits: Limits | None = None, batched: str = "", resident: str | None = None
) -> WorkerSlots:
    """``batched``: names of workers, one for each of their sequences; ``resident``: None means the same."""
    counted = Counter(batched.split())
    counted_resident = Counter((batched if resident is None else resident).split())
    return WorkerSlots(workers, {"m": limits or Limits(), "other": Limits()}, counted, counted_resident)


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
    assert not slots(*workers).has_slot("m")


def test_a_full_decode_worker_takes_no_sequence() -> None:
    assert slots(PREFILL, DECODE, batched="d1").has_slot("m")
    assert not slots(PREFILL, DECODE, batched="d1 d1").has_slot("m")


def test_a_busy_prefill_worker_still_takes_sequences() -> None:
    assert slots(PREFILL, DECODE, batched="p1 p1 p1").has_slot("m"), "prompts wait in its engine"


def test_paused_sequences_count_against_the_resident_limit_only() -> None:
    limits = Limits(max_num_seqs=2, resident_limit=3)
    assert slots(PREFILL, DECODE, limits=limits, batched="d1", resident="d1 d1").has_slot("m")
    assert not slots(PREFILL, DECODE, limits=limits, batched="d1", resident="d1 d1 d1").has_slot("m")


def test_a_swapped_lease_needs_a_slot_of_its_own_worker() -> None:
    second = worker("d2", Role.DECODE)
    both = slots(PREFILL, DECODE, second, batched="d1 d1")
    assert both.has_slot("m")
    assert not both.has_slot("m", "d1")
    assert both.has_slot("m", "d2")


def test_the_least_loaded_workers_are_chosen() -> None:
    prefills = [worker("p1", Role.PREFILL), worker("p2", Role.PREFILL)]
    decodes = [worker("d1", Role.DECODE), worker("d2", Role.DECODE)]
    chosen = slots(*prefills, *decodes, batched="p2 d1").choose("m")
    assert [one.name for one in chosen] == ["p1", "d2"]


def test_the_youngest_of_equally_loaded_workers_is_chosen() -> None:
    chosen = slots(PREFILL, worker("p2", Role.PREFILL), DECODE, worker("d2", Role.DECODE)).choose("m")
    assert [one.name for one in chosen] == ["p2", "d2"]


def test_a_worker_without_a_free_slot_is_not_chosen_however_small_its_batch() -> None:
    limits = Limits(max_num_seqs=5, resident_limit=2)
    chosen = slots(PREFILL, DECODE, worker("d2", Role.DECODE), limits=limits, batched="d1", resident="d1 d2 d2").choose(
        "m"
    )
    assert chosen[1].name == "d1", "d2 has paused sequences only, but too many"


def test_a_taken_slot_counts_for_the_next_sequence() -> None:
    free = slots(PREFILL, DECODE, worker("d2", Role.DECODE))
    names = []
    while free.has_slot("m"):
        prefill, decode = free.choose("m")
        free.take(prefill.name, decode.name)
        names.append(decode.name)
    assert names == ["d2", "d1", "d2", "d1"]


def test_ready_workers_are_of_the_role_and_model_the_youngest_first() -> None:
    workers = [DECODE, PREFILL, worker("d2", Role.DECODE), worker("d3", Role.DECODE, ready=False)]
    assert [one.name for one in ready_workers(workers, Role.DECODE, "m")] == ["d2", "d1"]
    assert ready_workers(workers, Role.DECODE, "other") == []
