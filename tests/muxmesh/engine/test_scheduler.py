"""Which jobs run in the next step, and the events of its outcome."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxmesh.engine.api import EngineJob, Failed, Finished, JobDone, Preempted, Tokens
from muxmesh.engine.scheduler import Scheduler, divide_token_budget
from muxmesh.engine.sequence import SequenceRecord
from muxmesh.engine.step import PromptScoring, SampledToken, Step, StepOutcome
from muxmesh.errors import InvalidRequest, SequenceFailed
from muxmesh.scheduling_policy import FCFS, SchedulingPolicy
from muxmesh.types import (
    Candidate,
    EngineRequest,
    Finish,
    FinishReason,
    Sampling,
    SchedulingState,
    Stopping,
    TokenLogprobs,
)

VOCAB_SIZE = 100_000


def job(
    job_id: int,
    prompt: int = 4,
    limit: int | None = None,
    priority: int = 0,
    stopping: Stopping | None = None,
    computed: int = 0,
    sampled: tuple[int, ...] = (),
    resume: tuple[int, ...] = (),
    blocks: tuple[int, ...] = tuple(range(5000)),
    sampling: Sampling | None = None,
) -> EngineJob:
    request = EngineRequest(
        request_id=str(job_id),
        model="m",
        prompt_token_ids=tuple(range(100, 100 + prompt)),
        sampling=sampling or Sampling(seed=5),
        stopping=stopping or Stopping(max_new_tokens=3, eos_token_ids=frozenset({0}), stop_token_ids=frozenset({9})),
        scheduling=SchedulingState(priority, float(job_id)),
        resume_token_ids=resume,
    )
    return EngineJob(job_id, SequenceRecord(request, 16, b"root", blocks, computed, sampled), limit)


def scheduler(max_num_seqs: int = 8, token_budget: int = 10) -> Scheduler:
    return Scheduler(max_num_seqs, token_budget, VOCAB_SIZE)


def shape(step: Step | None) -> list[tuple[int, int, int, bool]]:
    assert step is not None
    return [(chunk.job_id, chunk.start, len(chunk.token_ids), chunk.sample is not None) for chunk in step.chunks]


def run(jobs: Scheduler, *tokens: int) -> Step:
    step = jobs.next_step(0.0)
    assert step is not None
    sampling = [chunk.job_id for chunk in step.chunks if chunk.sample]
    jobs.apply(StepOutcome({job_id: (SampledToken(token),) for job_id, token in zip(sampling, tokens, strict=True)}))
    return step


def test_a_long_prompt_is_computed_in_chunks_of_the_budget() -> None:
    jobs = scheduler(token_budget=10)
    jobs.add(job(1, prompt=25))
    assert shape(run(jobs)) == [(1, 0, 10, False)]
    assert shape(run(jobs)) == [(1, 10, 10, False)]
    assert shape(run(jobs, 7)) == [(1, 20, 5, True)]
    assert jobs.drain_events() == [(1, Tokens(0, (7,)))]
    assert shape(run(jobs, 8)) == [(1, 25, 1, True)]


def test_chunks_are_smaller_deep_in_a_long_prompt_and_have_at_least_one_token() -> None:
    jobs = scheduler(token_budget=12)
    jobs.add(job(1, prompt=60_000, computed=2 * 1024))
    assert shape(run(jobs)) == [(1, 2048, 4, False)]
    jobs.cancel(1)
    jobs.add(job(2, prompt=60_000, computed=50_000))
    assert shape(run(jobs)) == [(2, 50_000, 1, False)]


def test_decodes_go_before_prompts_and_prompts_fill_the_rest() -> None:
    jobs = scheduler(token_budget=6)
    jobs.add(job(1, prompt=20))
    jobs.add(job(2, prompt=4, computed=4, sampled=(7,)))
    assert shape(jobs.next_step(0.0)) == [(2, 4, 1, True), (1, 0, 5, False)]


def test_order_is_priority_then_arrival() -> None:
    jobs = scheduler(max_num_seqs=2, token_budget=100)
    for job_id, priority in ((1, 0), (2, 0), (3, -1)):
        jobs.add(job(job_id, priority=priority))
    assert [chunk[0] for chunk in shape(jobs.next_step(0.0))] == [3, 1]


def test_another_scheduling_state_takes_effect_with_the_next_step() -> None:
    jobs = scheduler(max_num_seqs=1)
    late = job(2)
    jobs.add(job(1))
    jobs.add(late)
    late.sequence.scheduling = SchedulingState(-5, 0.0)
    assert [chunk[0] for chunk in shape(jobs.next_step(0.0))] == [2]


@pytest.mark.parametrize(
    ("token", "finish"),
    [(0, Finish(FinishReason.EOS, 0)), (9, Finish(FinishReason.STOP_TOKEN, 9)), (50, Finish(FinishReason.LENGTH))],
)
def test_a_sequence_finishes_at_an_end_token_a_stop_token_or_its_length(token: int, finish: Finish) -> None:
    jobs = scheduler()
    jobs.add(job(1, computed=4, sampled=(7,), resume=(6,)))
    run(jobs, token)
    assert jobs.drain_events() == [(1, Tokens(2, (token,))), (1, Finished(finish))]
    assert not jobs.has_work()


def test_tokens_that_would_end_the_output_before_its_minimum_are_banned() -> None:
    jobs = scheduler()
    stopping = Stopping(3, min_new_tokens=2, eos_token_ids=frozenset({0}), stop_token_ids=frozenset({9}))
    jobs.add(job(1, stopping=stopping))
    specs = [run(jobs, token).chunks[0].sample for token in (7, 8)]
    assert [spec.banned for spec in specs if spec] == [frozenset({0, 9}), frozenset()]


def test_a_prefill_job_ends_with_its_first_token() -> None:
    jobs = scheduler()
    jobs.add(job(1, limit=1))
    run(jobs, 7)
    assert jobs.drain_events() == [(1, Tokens(0, (7,))), (1, JobDone())]


def test_a_prefill_job_whose_first_token_ends_the_output_is_finished() -> None:
    jobs = scheduler()
    jobs.add(job(1, limit=1))
    run(jobs, 0)
    assert jobs.drain_events() == [(1, Tokens(0, (0,))), (1, Finished(Finish(FinishReason.EOS, 0)))]


def test_a_resumed_job_samples_at_the_next_output_index() -> None:
    jobs = scheduler(token_budget=100)
    jobs.add(job(1, resume=(6, 7)))
    step = run(jobs, 8)
    assert shape(step) == [(1, 0, 6, True)]
    sample = step.chunks[0].sample
    assert sample is not None
    assert sample.output_index == 2
    assert jobs.drain_events()[0] == (1, Tokens(2, (8,)))


def test_the_outcome_of_a_job_that_was_cancelled_in_flight_is_dropped() -> None:
    jobs = scheduler()
    jobs.add(job(1))
    jobs.add(job(2))
    step = jobs.next_step(0.0)
    assert jobs.cancel(1) is True
    assert step is not None
    jobs.apply(StepOutcome({1: (SampledToken(7),), 2: (SampledToken(8),)}))
    assert jobs.drain_events() == [(2, Tokens(0, (8,)))]
    assert jobs.cancel(2) is False
    assert jobs.next_step(0.0) is None


def test_a_paused_job_continues_at_its_position() -> None:
    jobs = scheduler()
    jobs.add(job(1))
    run(jobs, 7)
    jobs.preempt(1)
    jobs.preempt(1)
    assert jobs.drain_events()[1:] == [(1, Preempted())]
    assert not jobs.has_work()
    jobs.resume(1)
    assert shape(jobs.next_step(0.0)) == [(1, 4, 1, True)]


def test_a_job_in_flight_is_paused_after_its_step() -> None:
    jobs = scheduler()
    jobs.add(job(1))
    jobs.next_step(0.0)
    jobs.preempt(1)
    assert jobs.drain_events() == []
    jobs.apply(StepOutcome({1: (SampledToken(7),)}))
    assert jobs.drain_events() == [(1, Tokens(0, (7,))), (1, Preempted())]


def test_a_failed_sequence_ends_alone_and_its_chunk_does_not_count_as_computed() -> None:
    jobs, failing, sound = scheduler(), job(1), job(2)
    jobs.add(failing)
    jobs.add(sound)
    jobs.next_step(0.0)
    jobs.apply(StepOutcome({2: (SampledToken(7),)}, failed={1: Failed("not finite", SequenceFailed)}))
    assert jobs.drain_events() == [(1, Failed("not finite", SequenceFailed)), (2, Tokens(0, (7,)))]
    assert (failing.sequence.num_computed_tokens, sound.sequence.num_computed_tokens) == (0, 4)
    assert [chunk[0] for chunk in shape(jobs.next_step(0.0))] == [2]


def test_a_failed_sequence_that_was_cancelled_meanwhile_has_no_event() -> None:
    jobs = scheduler()
    jobs.add(job(1))
    jobs.next_step(0.0)
    assert jobs.cancel(1)
    jobs.apply(StepOutcome({}, failed={1: Failed("not finite")}))
    assert jobs.drain_events() == []


@pytest.mark.parametrize("token_id", [-1, VOCAB_SIZE])
def test_a_sampled_token_that_the_model_does_not_have_fails_its_sequence(token_id: int) -> None:
    jobs, failing = scheduler(), job(1)
    jobs.add(failing)
    jobs.next_step(0.0)
    jobs.apply(StepOutcome({1: (SampledToken(token_id),)}))
    reason = f"the runner sampled token id {token_id}; the model has {VOCAB_SIZE} tokens"
    assert jobs.drain_events() == [(1, Failed(reason, SequenceFailed))]
    assert failing.sequence.num_output_tokens == 0


def test_a_job_with_a_token_that_the_model_does_not_have_is_refused_and_not_added() -> None:
    jobs = scheduler()
    with pytest.raises(InvalidRequest, match=f"token id {VOCAB_SIZE} is unknown; the model has {VOCAB_SIZE} tokens"):
        jobs.add(job(1, resume=(5, VOCAB_SIZE)))
    assert not jobs.has_work()


def test_a_sequence_knows_how_long_steps_have_computed_it() -> None:
    jobs, long = scheduler(token_budget=3), job(1, prompt=6)
    jobs.add(long)
    jobs.next_step(0.0)
    jobs.apply(StepOutcome({}), run_s=0.5)
    jobs.next_step(0.0)
    jobs.apply(StepOutcome({1: (SampledToken(7),)}), run_s=0.25)
    assert long.sequence.computing_s == 0.75


def test_a_job_with_a_known_id_is_refused() -> None:
    jobs = scheduler()
    jobs.add(job(1))
    with pytest.raises(ValueError, match="known already"):
        jobs.add(job(1))


def test_a_job_whose_blocks_are_full_waits_for_more() -> None:
    jobs = scheduler(token_budget=100)
    full = job(1, prompt=15, stopping=Stopping(max_new_tokens=40), blocks=(3,))
    jobs.add(full)
    jobs.add(job(2, stopping=Stopping(max_new_tokens=40)))
    assert [chunk.job_id for chunk in run(jobs, 7, 8).chunks] == [1, 2]
    assert [chunk.job_id for chunk in run(jobs, 7, 8).chunks] == [1, 2], "the sixteenth token's KV fits"
    assert [chunk.job_id for chunk in run(jobs, 8).chunks] == [2]
    jobs.cancel(2)
    assert not jobs.has_work()
    full.sequence.add_blocks((9,))
    assert run(jobs, 7).chunks[0].block_ids == (3, 9)


def test_prefill_may_sample_more_than_one_token() -> None:
    jobs = scheduler()
    prefill = job(1, limit=2)
    jobs.add(prefill)
    run(jobs, 7)
    assert jobs.has_work()
    run(jobs, 8)
    assert jobs.drain_events() == [(1, Tokens(0, (7,))), (1, Tokens(1, (8,))), (1, JobDone())]
    assert (prefill.sequence.num_computed_tokens, prefill.sequence.output_token_ids) == (5, (7, 8))


def test_the_limit_of_a_job_does_not_count_resumed_tokens() -> None:
    jobs = scheduler()
    jobs.add(job(1, limit=1, resume=(6,)))
    run(jobs, 7)
    assert jobs.drain_events() == [(1, Tokens(1, (7,))), (1, JobDone())]


def test_prompt_log_probabilities_are_of_the_tokens_that_follow() -> None:
    jobs = scheduler(token_budget=3)
    jobs.add(job(1, prompt=5, sampling=Sampling(prompt_logprobs=2)))
    first, second = jobs.next_step(0.0), None
    assert first is not None and first.chunks[0].scoring == PromptScoring((101, 102, 103), 2)
    jobs.apply(StepOutcome({}, {1: ()}))
    second = jobs.next_step(0.0)
    assert second is not None and second.chunks[0].scoring == PromptScoring((104,), 2), (
        "no prompt token follows the last"
    )
    assert second.chunks[0].num_logit_rows == 2


def test_the_tokens_so_far_are_given_only_for_penalties() -> None:
    jobs = scheduler()
    jobs.add(job(1, resume=(6,), sampling=Sampling(repetition_penalty=1.2)))
    jobs.add(job(2, resume=(6,)))
    step = jobs.next_step(0.0)
    assert step is not None
    specs = {chunk.job_id: chunk.sample for chunk in step.chunks}
    assert specs[1] is not None and specs[2] is not None
    assert (specs[1].prompt_token_ids, specs[1].output_token_ids) == ((100, 101, 102, 103), (6,))
    assert (specs[2].prompt_token_ids, specs[2].output_token_ids) == ((), ())


def test_a_token_bitmask_is_passed_to_the_sampler() -> None:
    jobs, masked = scheduler(), job(1)
    masked.sequence.token_bitmask = np.array([5], dtype=np.uint32)
    jobs.add(masked)
    step = jobs.next_step(0.0)
    assert step is not None and step.chunks[0].sample is not None
    assert step.chunks[0].sample.token_bitmask is masked.sequence.token_bitmask


def test_a_pre_emption_that_is_taken_back_during_the_step_has_no_effect() -> None:
    jobs = scheduler()
    jobs.add(job(1))
    jobs.next_step(0.0)
    jobs.preempt(1)
    jobs.resume(1)
    jobs.apply(StepOutcome({1: (SampledToken(7),)}))
    assert jobs.drain_events() == [(1, Tokens(0, (7,)))]
    assert jobs.has_work()


def test_a_job_that_ends_in_the_step_is_not_pre_empted() -> None:
    jobs = scheduler()
    jobs.add(job(1, limit=1))
    jobs.next_step(0.0)
    jobs.preempt(1)
    jobs.apply(StepOutcome({1: (SampledToken(7),)}))
    assert jobs.drain_events() == [(1, Tokens(0, (7,))), (1, JobDone())]


def test_without_a_ready_job_there_is_no_step() -> None:
    jobs = scheduler()
    assert jobs.next_step(0.0) is None
    jobs.add(job(1))
    jobs.preempt(1)
    assert jobs.next_step(0.0) is None and not jobs.has_work()


def test_a_step_is_applied_before_the_next_is_planned() -> None:
    jobs = scheduler()
    jobs.add(job(1))
    jobs.next_step(0.0)
    with pytest.raises(AssertionError, match="applied first"):
        jobs.next_step(0.0)


def test_an_ending_engine_fails_every_job() -> None:
    jobs = scheduler(max_num_seqs=1)
    for job_id in (1, 2):
        jobs.add(job(job_id))
    jobs.next_step(0.0)
    jobs.fail_all(Failed("stopped"))
    assert jobs.drain_events() == [(1, Failed("stopped")), (2, Failed("stopped"))]
    assert jobs.next_step(0.0) is None


def test_requested_log_probabilities_are_in_the_event_of_their_token() -> None:
    jobs = scheduler()
    jobs.add(job(1))
    jobs.next_step(0.0)
    logprobs = TokenLogprobs(Candidate(7, -0.5, 1))
    jobs.apply(StepOutcome({1: (SampledToken(7, logprobs),)}))
    assert jobs.drain_events() == [(1, Tokens(0, (7,), (logprobs,)))]


@dataclass(frozen=True)
class Item:
    """What the budget is divided by."""

    scheduling: SchedulingState
    num_computed_tokens: int
    num_uncomputed_tokens: int


items = st.lists(
    st.builds(
        lambda priority, arrived, computed, uncomputed: Item(SchedulingState(priority, arrived), computed, uncomputed),
        st.integers(-1, 1),
        st.integers(0, 5).map(float),
        st.integers(0, 5000),
        st.integers(1, 40),
    ),
    max_size=12,
)


@given(items, st.integers(1, 8), st.integers(1, 64))
def test_a_divided_budget_is_kept_and_in_order(of: list[Item], max_num_seqs: int, token_budget: int) -> None:
    shares = divide_token_budget(of, FCFS, 0.0, max_num_seqs, token_budget)
    assert bool(shares) is bool(of)
    assert len(shares) <= min(max_num_seqs, len(of))
    assert all(1 <= count <= item.num_uncomputed_tokens for item, count in shares)
    assert len(shares) == 1 or sum(count for _, count in shares) <= token_budget
    keys = [
        (item.num_uncomputed_tokens > 1, item.scheduling.priority, item.scheduling.arrived_at_s) for item, _ in shares
    ]
    assert keys == sorted(keys)


@given(items, st.integers(1, 8))
def test_no_sequence_that_decodes_waits_while_a_prompt_is_computed(of: list[Item], max_num_seqs: int) -> None:
    shares = divide_token_budget(of, FCFS, 0.0, max_num_seqs, token_budget=max_num_seqs)
    decoding = sum(item.num_uncomputed_tokens == 1 for item in of)
    assert sum(item.num_uncomputed_tokens == 1 for item, _ in shares) == min(decoding, max_num_seqs)


def test_the_order_is_that_of_the_policy_at_the_time_of_the_step() -> None:
    policy = SchedulingPolicy("hrrn", longest_lead=0.0, longest_lead_s=0.0, quantum_s=1.0)
    old = Item(SchedulingState(0, arrived_at_s=0.0, decode_s=100.0), 9, 1)
    short = Item(SchedulingState(0, arrived_at_s=9.0, decode_s=1.0), 9, 1)
    assert divide_token_budget([old, short], policy, 9.05, 1, 8) == [(old, 1)]
    assert divide_token_budget([old, short], policy, 10.0, 1, 8) == [(short, 1)]
