"""The metrics of a worker, from its slot of the grant page and its own counters."""

from collections.abc import Iterator

import pytest

from kvstore.device_memory import Transport
from kvstore.grant_page import GrantPage, Word
from kvstore.grant_table import GrantTable
from muxmesh.metrics.family import Family, HistogramValue
from muxmesh.types import Role
from worker.worker_metrics import WorkerCounters, WorkerMetrics

WORDS = {
    Word.NUM_STEPS: 5,
    Word.NUM_GRANTS: 2,
    Word.NUM_COMPUTED_TOKENS: 60,
    Word.KV_BYTES_WRITTEN: 600,
    Word.BUSY_NS: 8_500_000_000,
    Word.SWAP_OUT_BYTES: 90,
    Word.SWAP_IN_BYTES: 80,
    Word.SWAP_NS: 250_000_000,
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
    metrics = WorkerMetrics("u", "m", role, Transport.VMM_FD, page, 3, 10, counters or WorkerCounters())
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
    found = families(page, Role.DECODE, WorkerCounters(num_preemptions=4))
    assert found["vllm:num_preemptions_total"].samples == {("u", "m"): 4}
    assert found["muxmesh_swap_copied_bytes_total"].samples == {("u", "m", "out"): 90, ("u", "m", "in"): 80}
    assert found["muxmesh_swap_seconds_total"].samples == {("u", "m"): 0.25}
    assert "vllm:num_preemptions_total" not in families(page, Role.PREFILL)


def test_only_prefill_hands_off(page: GrantPage) -> None:
    counters = WorkerCounters()
    counters.handoff_s.observe(0.003)
    (value,) = families(page, Role.PREFILL, counters)["muxmesh_handoff_seconds"].samples.values()
    assert isinstance(value, HistogramValue)
    assert (value.cumulative[-1], value.sum) == (1, 0.003)
    assert "muxmesh_handoff_seconds" not in families(page, Role.DECODE)
