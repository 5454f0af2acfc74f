"""What entries waited for, from the causes that each admission leaves."""

from collections.abc import Mapping

from hypothesis import given
from hypothesis import strategies as st

from kvstore.wait_times import EntryKey, WaitTimes
from muxmesh.types import WaitCause, Waits

A, B = ("router", 1), ("router", 2)


def updated(*steps: tuple[float, set[EntryKey], Mapping[EntryKey, WaitCause]]) -> WaitTimes:
    times = WaitTimes()
    for now_s, waiting, first in steps:
        times.update(waiting, first, now_s)
    return times


def test_the_first_entry_waits_for_capacity_and_the_others_for_the_order() -> None:
    times = updated((10.0, {A, B}, {A: WaitCause.SLOT}))
    assert (times.of(A, 12.5), times.of(B, 12.5)) == (Waits(slot_s=2.5), Waits(order_s=2.5))


def test_a_cause_that_changes_keeps_the_seconds_of_those_before_it() -> None:
    times = updated(
        (10.0, {A, B}, {A: WaitCause.SLOT}),
        (11.0, {A, B}, {A: WaitCause.SLOT}),
        (14.0, {B}, {B: WaitCause.SLOT}),
        (15.0, {B}, {B: WaitCause.KV}),
        (17.0, {B, A}, {A: WaitCause.WORKER}),
    )
    assert times.of(B, 18.0) == Waits(order_s=5.0, slot_s=1.0, kv_s=2.0)
    assert times.of(A, 18.0) == Waits(worker_s=1.0), "an entry that has left begins anew"


def test_an_entry_that_was_admitted_at_once_waited_for_nothing() -> None:
    assert WaitTimes().of(A, 5.0) == Waits()


@given(st.lists(st.tuples(st.floats(0, 5), st.sampled_from([None, *WaitCause])), min_size=1))
def test_the_causes_add_up_to_the_wait(steps: list[tuple[float, WaitCause | None]]) -> None:
    times, now_s = WaitTimes(), 100.0
    for seconds, cause in steps:
        times.update({A}, {A: cause} if cause else {}, now_s)
        now_s += seconds
    waits = times.of(A, now_s)
    total_s = waits.slot_s + waits.kv_s + waits.order_s + waits.worker_s + waits.device_s
    assert abs(total_s - (now_s - 100.0)) < 1e-9
