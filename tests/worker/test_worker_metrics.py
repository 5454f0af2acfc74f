"""The metrics of a worker, from its slot of the grant page and its own counters."""

from collections import Counter
from collections.abc import Iterator

import pytest

from kvstore.device_memory import Transport
from kvstore.grant_page import GrantPage, Word
from kvstore.grant_table import GrantTable
from muxmesh.clock import ManualClock
from muxmesh.execution import PreemptionReason
from muxmesh.metrics.family import Family, HistogramValue
from muxmesh.sequence_states import SequenceState
from muxmesh.types import Role
from worker.worker_metrics import WorkerCounters, WorkerMetrics

WORDS = {
    Word.NUM_STEPS: 5,
    Word.NUM_GRANTS: 2,
    Word.NUM_COMPUTED_TOKENS: 60,
    Word.KV_BYTES_WRITTEN: 600,
    Word.BUSY_NS: 8_500_000_000,
    Word.GRANT_WAIT_NS: 250_000_000,
}


@pytest.fixture
def page() -> Iterator[GrantPage]:
    grants = GrantTable()
    for word, value in WORDS.items():
        grants.page.write(3, word, value)
    yield grants.page
    grants.close()


def families(page: GrantPage, role: Role, counters: WorkerCounters | None = None) -> dict[str, Family]:
    metrics = WorkerMetrics(
        "u", "m", role, Transport.VMM_FD, page, 3, 10, counters or WorkerCounters(), ManualClock(9.0)
    )
    return {family.name: family for family in metrics.families()}


@pytest.mark.parametrize("role", list(Role))
def test_the_words_of_the_slot_are_shown(page: GrantPage, role: Role) -> None:
    found = families(page, role)
    values = {name: one.samples["u", "m", role.value] for name, one in found.items() if "role" in one.label_names}
    assert values == {
        "muxmesh_worker_busy_seconds_total": 8.5,
        "muxmesh_worker_grants_total": 2,
        "muxmesh_worker_grant_wait_seconds_total": 0.25,
        "muxmesh_worker_steps_total": 5,
        "muxmesh_worker_computed_tokens_total": 60,
        "muxmesh_kv_written_bytes_total": 600,
        "muxmesh_kv_copied_bytes_total": 0,
    }


def test_bytes_that_no_computed_token_wrote_are_copies(page: GrantPage) -> None:
    page.write(3, Word.KV_BYTES_WRITTEN, 640)
    assert families(page, Role.DECODE)["muxmesh_kv_copied_bytes_total"].samples == {("u", "m", "decode"): 40}


def test_only_decode_swaps_and_is_preempted(page: GrantPage) -> None:
    counters = WorkerCounters(
        Counter({PreemptionReason.ORDER: 3, PreemptionReason.KV_FULL: 4}), num_recomputed=2, num_repredictions=6
    )
    counters.swaps["out", "raw"].add(90, 0.5)
    counters.swaps["out", "raw"].add(60, 0.25)
    counters.swaps["in", "int8"].add(80, 0.125)
    found = families(page, Role.DECODE, counters)
    assert found["vllm:num_preemptions_total"].samples == {("u", "m"): 7}
    by_reason = found["muxmesh_preemptions_total"].samples
    assert {labels[2]: n for labels, n in by_reason.items() if n} == {"order": 3, "kv_full": 4}
    assert {labels[2] for labels in by_reason} == set(PreemptionReason), "all reasons are there from the start"
    assert found["muxmesh_recomputed_sequences_total"].samples == {("u", "m"): 2}
    assert found["muxmesh_repredictions_total"].samples == {("u", "m"): 6}
    swapped = {
        name: {labels[2:]: value for labels, value in found[f"muxmesh_swap_{name}_total"].samples.items() if value}
        for name in ("copies", "copied_bytes", "seconds")
    }
    assert swapped == {
        "copies": {("out", "raw"): 2, ("in", "int8"): 1},
        "copied_bytes": {("out", "raw"): 150, ("in", "int8"): 80},
        "seconds": {("out", "raw"): 0.75, ("in", "int8"): 0.125},
    }
    assert len(found["muxmesh_swap_copies_total"].samples) == 4, "all kinds are there from the start"
    assert "vllm:num_preemptions_total" not in families(page, Role.PREFILL)


def test_the_seconds_of_states_are_those_until_the_scrape(page: GrantPage) -> None:
    counters = WorkerCounters()
    counters.states.begin(1, SequenceState.BATCHED, 2.0)
    counters.states.enter(1, SequenceState.PAUSED, 5.0)
    counters.states.begin(2, SequenceState.PREFILL, 8.0)
    name = "muxmesh_sequence_seconds_total"
    decode, prefill = (families(page, role, counters)[name].samples for role in (Role.DECODE, Role.PREFILL))
    assert prefill == {("u", "m", "prefill"): 1.0}
    assert decode == {
        ("u", "m", state): {"batched": 3.0, "paused": 4.0}.get(state, 0.0)
        for state in ("batched", "paused", "swapping_out", "swapped", "swapping_in")
    }


def test_only_prefill_hands_off(page: GrantPage) -> None:
    counters = WorkerCounters()
    counters.handoff_s.observe(0.003)
    (value,) = families(page, Role.PREFILL, counters)["muxmesh_handoff_seconds"].samples.values()
    assert isinstance(value, HistogramValue)
    assert (value.cumulative[-1], value.sum) == (1, 0.003)
    assert "muxmesh_handoff_seconds" not in families(page, Role.DECODE)
