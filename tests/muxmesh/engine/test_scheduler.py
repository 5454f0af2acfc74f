"""Which jobs run in the next step, and the events of its outcome."""

import math

import numpy as np
import pytest

from muxmesh.engine.api import (
    Batched,
    ComputeDemand,
    Displaced,
    EngineJob,
    Failed,
    Finished,
    JobDone,
    Preempted,
    Tokens,
)
from muxmesh.engine.scheduler import Scheduler
from muxmesh.engine.sequence import SequenceRecord
from muxmesh.engine.step import PromptScoring, SampledToken, Step, StepOutcome
from muxmesh.errors import InvalidRequest, SequenceFailed
from muxmesh.execution import PreemptionReason
from muxmesh.scheduling_policy import SchedulingPolicy
from muxmesh.types import (
    Candidate,
    EngineRequest,
    Finish,
    FinishReason,
    LengthPrediction,
    Sampling,
    SchedulingState,
    SloTargets,
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
    slo: SloTargets | None = None,
) -> EngineJob:
    request = EngineRequest(
        request_id=str(job_id),
        model="m",
        prompt_token_ids=tuple(range(100, 100 + prompt)),
        sampling=sampling or Sampling(seed=5),
        stopping=stopping or Stopping(max_new_tokens=3, eos_token_ids=frozenset({0}), stop_token_ids=frozenset({9})),
        scheduling=SchedulingState(priority, float(job_id)),
        resume_token_ids=resume,
        slo=slo,
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


ENDLESS = Stopping(max_new_tokens=1000)
SLO = SloTargets(ttft_s=2.0, tpot_s=0.5, waited_s=0.25)


def decoding(job_id: int, slo: SloTargets | None = SLO, priority: int = 0) -> EngineJob:
    """A job as the decode worker gets it from prefill: its first output token is sampled."""
    return job(job_id, computed=4, sampled=(7,), slo=slo, stopping=ENDLESS, priority=priority)


def timed(jobs: Scheduler, now_s: float, run_s: float) -> Step:
    """Plans a step at ``now_s`` and applies it after ``run_s``."""
    step = jobs.next_step(now_s)
    assert step is not None
    sampled = {chunk.job_id: (SampledToken(7),) for chunk in step.chunks if chunk.sample}
    jobs.apply(StepOutcome(sampled), run_s)
    return step


def test_a_demand_has_the_best_class_and_the_oldest_request_of_the_ready_jobs() -> None:
    jobs = scheduler()
    jobs.add(decoding(3, slo=None, priority=1))
    jobs.add(decoding(5, slo=None, priority=-2))
    assert jobs.demand(100.0) == ComputeDemand(-2, 3.0, math.inf)
    timed(jobs, 100.0, 0.1)
    assert jobs.demand(100.1) == ComputeDemand(-2, 3.0, math.inf)
    jobs.preempt(5)
    timed(jobs, 100.1, 0.1)
    assert jobs.demand(100.2) == ComputeDemand(1, 3.0, math.inf)
    jobs.resume(5)
    assert jobs.demand(100.2).priority == -2
    jobs.cancel(3)
    timed(jobs, 100.2, 0.1)
    assert jobs.demand(100.3) == ComputeDemand(-2, 5.0, math.inf)


def test_the_slack_of_a_prompt_is_the_time_to_its_target_less_the_time_it_needs() -> None:
    jobs = scheduler(token_budget=10)
    jobs.add(job(1, prompt=30, slo=SLO), 100.0)  # it had waited for 0.25 s when the router sent it
    assert jobs.demand(100.0).slack_s == pytest.approx(1.75)
    timed(jobs, 100.0, 0.2)  # 0.02 s for each token
    assert jobs.demand(100.2).slack_s == pytest.approx(101.75 - 100.2 - 20 * 0.02)
    timed(jobs, 100.2, 0.2)
    assert jobs.demand(100.4).slack_s == pytest.approx(101.75 - 100.4 - 10 * 0.02)


def test_a_prompt_that_did_not_fit_into_the_step_counts_too() -> None:
    jobs = scheduler(token_budget=10)
    jobs.add(job(1, prompt=30, priority=-1), 100.0)
    jobs.add(job(2, prompt=5, slo=SLO), 100.0)
    timed(jobs, 100.0, 0.1)
    assert shape(timed(jobs, 100.1, 0.1)) == [(1, 10, 10, False)]
    assert jobs.demand(100.2).slack_s == pytest.approx(101.75 - 100.2 - 5 * 0.01)


def test_each_token_of_a_decoding_sequence_is_due_its_target_after_the_one_before() -> None:
    jobs = scheduler()
    jobs.add(decoding(1), 100.0)
    for num_tokens in (1, 2, 3):
        now_s = 100.0 + 0.1 * num_tokens
        assert jobs.demand(now_s).slack_s == pytest.approx(0.5 * num_tokens - 0.1 * num_tokens)
        timed(jobs, now_s, 0.1)


def test_a_run_of_steps_moves_the_time_due_by_all_its_tokens() -> None:
    jobs = scheduler()
    jobs.add(decoding(1), 100.0)
    assert jobs.next_step(100.0, 4) is not None
    jobs.apply(StepOutcome({1: tuple(SampledToken(7) for _ in range(4))}, num_steps=4), 0.4)
    assert jobs.demand(100.4).slack_s == pytest.approx(0.5 * 5 - 0.4)


def test_a_sequence_whose_first_token_comes_here_is_due_from_that_token_on() -> None:
    jobs = scheduler()
    jobs.add(job(1, prompt=4, slo=SLO, stopping=ENDLESS), 100.0)
    timed(jobs, 100.0, 0.3)
    assert jobs.demand(100.3).slack_s == pytest.approx(0.5)


def test_a_sequence_that_is_computed_again_after_a_fault_is_as_late_as_its_first_token() -> None:
    jobs = scheduler()
    jobs.add(job(1, resume=(7, 8), slo=SloTargets(2.0, 0.5, waited_s=5.0)), 100.0)
    assert jobs.demand(100.0).slack_s == pytest.approx(-3.0)


def test_a_sequence_that_has_missed_its_slo_does_not_hide_one_that_can_meet_it() -> None:
    jobs = scheduler()
    jobs.add(decoding(1), 80.0)  # 19.5 s late
    jobs.add(decoding(2), 100.0)
    assert jobs.demand(100.0).slack_s == pytest.approx(0.5)
    timed(jobs, 100.0, 0.1)
    assert jobs.demand(100.1).slack_s == pytest.approx(0.9)
    late = jobs.demand(105.0)
    assert late.slack_s == pytest.approx(-4.0) and late.lost_s == pytest.approx(0.0), "it may still catch up"
    assert jobs.demand(120.0).lost_s < 0, "both have missed it"


def test_a_job_that_waited_for_blocks_is_in_the_demand_when_it_has_them() -> None:
    jobs = scheduler()
    waiting = job(1, computed=16, prompt=16, sampled=(7,), blocks=(0,) * 2, stopping=ENDLESS)
    jobs.add(waiting, 100.0)
    for step in range(15):
        timed(jobs, 100.0 + step, 0.1)
    assert jobs.has_work()
    timed(jobs, 120.0, 0.1)
    assert not jobs.has_work()
    assert jobs.next_step(121.0) is None
    waiting.sequence.add_blocks((1,))
    assert jobs.demand(122.0) == ComputeDemand(0, 1.0, math.inf)


# More sequences than the batch holds


def decode_job(
    job_id: int,
    remaining_s: float,
    priority: int = 0,
    length: float = 100.0,
    tpot_s: float | None = None,
    num_preemptions: int = 0,
) -> EngineJob:
    """A sequence with one output token of ``length`` expected ones, which have ``remaining_s`` of work."""
    state = SchedulingState(priority, float(job_id), decode_s=remaining_s, num_preemptions=num_preemptions)
    request = EngineRequest(
        request_id=str(job_id),
        model="m",
        prompt_token_ids=(1, 2, 3, 4),
        sampling=Sampling(seed=5),
        stopping=Stopping(max_new_tokens=1000),
        scheduling=state,
        prediction=LengthPrediction(length, 2 * length),
        slo=None if tpot_s is None else SloTargets(None, tpot_s),
    )
    return EngineJob(job_id, SequenceRecord(request, 16, b"root", tuple(range(500)), 4, (7,)))


def srtf_scheduler(max_num_seqs: int = 2) -> Scheduler:
    return Scheduler(max_num_seqs, 10, VOCAB_SIZE, SchedulingPolicy("srtf", 0.0, 0.0, 1.0))


def batch_of(jobs: Scheduler, now_s: float = 0.0) -> list[int]:
    """Computes a step; the ids of its jobs."""
    step = jobs.next_step(now_s)
    assert step is not None
    jobs.apply(StepOutcome({chunk.job_id: (SampledToken(50),) for chunk in step.chunks}))
    return sorted(chunk.job_id for chunk in step.chunks)


def batch_changes(jobs: Scheduler) -> list[tuple[int, object]]:
    return [(job_id, event) for job_id, event in jobs.drain_events() if isinstance(event, Displaced | Batched)]


def test_a_sequence_with_less_work_displaces_another_which_returns_when_a_slot_is_free() -> None:
    jobs = srtf_scheduler()
    jobs.add(decode_job(1, 100.0))
    jobs.add(decode_job(2, 80.0))
    assert batch_of(jobs) == [1, 2]
    jobs.add(decode_job(3, 10.0))
    assert batch_of(jobs) == [2, 3]
    assert batch_changes(jobs) == [(1, Displaced(PreemptionReason.ORDER))]
    assert batch_of(jobs) == [2, 3]
    assert batch_changes(jobs) == [], "an event is sent once"
    jobs.cancel(3)
    assert batch_of(jobs) == [1, 2]
    assert batch_changes(jobs) == [(1, Batched())]


def test_slack_goes_before_remaining_work_until_the_sequence_is_safe() -> None:
    """Its token is due every second and it gets one every 0.1 s. To have 50 s of slack takes 55 tokens."""
    jobs = srtf_scheduler(max_num_seqs=1)
    jobs.add(decode_job(1, 100.0, length=1000.0, tpot_s=1.0), 0.0)
    assert batch_of(jobs, 0.0) == [1]
    jobs.add(decode_job(2, 10.0), 0.0)
    now_s, num_tokens = 0.1, 1
    while batch_of(jobs, now_s) == [1]:
        now_s += 0.1
        num_tokens += 1
    assert 45 <= num_tokens <= 60
    due_s = num_tokens + 1.0
    assert batch_of(jobs, due_s - 0.1) == [2], "it is ahead of its target"
    assert batch_of(jobs, due_s) == [1], "its token is due, however much it has left"
    assert batch_of(jobs, due_s + 0.1) == [1], "and one token leaves it no slack"


def test_a_sequence_that_has_missed_its_slo_is_displaced_as_any_other() -> None:
    jobs = srtf_scheduler(max_num_seqs=1)
    jobs.add(decode_job(1, 100.0, length=1000.0, tpot_s=0.1), 0.0)
    assert batch_of(jobs, 0.0) == [1]
    jobs.add(decode_job(2, 10.0), 50.0)
    assert batch_of(jobs, 50.0) == [2]


def test_a_sequence_that_finds_the_batch_full_is_displaced_at_once() -> None:
    jobs = srtf_scheduler(max_num_seqs=1)
    jobs.add(decode_job(1, 10.0))
    jobs.add(decode_job(2, 9.0))
    assert batch_of(jobs) == [2], "both come before the first step"
    assert batch_changes(jobs) == [(1, Displaced())]
    jobs.add(decode_job(3, 8.0))
    assert batch_of(jobs) == [2]
    assert batch_changes(jobs) == [(3, Displaced())]


def test_a_displaced_sequence_continues_with_the_tokens_that_it_has() -> None:
    jobs = srtf_scheduler(max_num_seqs=1)
    jobs.add(decode_job(1, 100.0))
    for _ in range(3):
        batch_of(jobs)
    jobs.add(decode_job(2, 1.0))
    batch_of(jobs)
    jobs.cancel(2)
    jobs.drain_events()
    batch_of(jobs)
    assert (1, Tokens(4, (50,))) in jobs.drain_events()


def test_a_displaced_sequence_that_is_paused_for_memory_returns_by_its_order() -> None:
    jobs = srtf_scheduler(max_num_seqs=1)
    jobs.add(decode_job(1, 100.0))
    batch_of(jobs)
    jobs.add(decode_job(2, 1.0))
    batch_of(jobs)
    jobs.drain_events()
    jobs.preempt(1)
    assert jobs.drain_events() == [(1, Preempted())]
    jobs.resume(1)
    assert batch_of(jobs) == [2]
    assert batch_changes(jobs) == [(1, Displaced())], "the event follows again: its KV has moved since"


def test_a_sequence_is_displaced_by_its_class_three_times_only() -> None:
    jobs = srtf_scheduler(max_num_seqs=1)
    jobs.add(decode_job(1, 1000.0, length=900.0))
    batch_of(jobs)
    for job_id in range(2, 5):
        jobs.add(decode_job(job_id, 1.0))
        assert batch_of(jobs) == [job_id]
        jobs.cancel(job_id)
        assert batch_of(jobs) == [1]
    jobs.add(decode_job(5, 1.0))
    assert batch_of(jobs) == [1]
    jobs.add(decode_job(6, 1.0, priority=-1))
    assert batch_of(jobs) == [6], "a better class displaces it still"


def test_a_sequence_counts_on_from_its_earlier_attempts_how_often_it_was_displaced() -> None:
    jobs = srtf_scheduler(max_num_seqs=1)
    jobs.add(decode_job(1, 1000.0, length=900.0, num_preemptions=2))
    batch_of(jobs)
    jobs.add(decode_job(2, 1.0))
    assert batch_of(jobs) == [2]
    jobs.cancel(2)
    jobs.add(decode_job(3, 1.0))
    assert batch_of(jobs) == [3], "it takes a free slot"
    jobs.cancel(3)
    batch_of(jobs)
    jobs.add(decode_job(4, 1.0))
    assert batch_of(jobs) == [1]


def test_the_remaining_work_of_a_running_sequence_decides_and_not_that_of_its_arrival() -> None:
    jobs = srtf_scheduler(max_num_seqs=1)
    jobs.add(decode_job(1, 100.0))
    for _ in range(60):
        assert batch_of(jobs) == [1]
    jobs.add(decode_job(2, 45.0))  # less than half of 100, but not of what is left
    assert batch_of(jobs) == [1]


def test_a_run_of_steps_goes_on_while_others_wait_for_a_slot() -> None:
    jobs = srtf_scheduler(max_num_seqs=1)
    jobs.add(decode_job(1, 10.0))
    jobs.add(decode_job(2, 9.0))
    step = jobs.next_step(0.0, max_steps=8)
    assert step is not None and step.num_steps == 8
    assert [chunk.job_id for chunk in step.chunks] == [2]


def test_a_sequence_that_waits_for_a_token_block_loses_its_slot_and_returns_by_its_order() -> None:
    jobs = srtf_scheduler(max_num_seqs=2)
    growing = decode_job(1, 10.0)
    jobs.add(growing)
    jobs.add(decode_job(2, 11.0))
    jobs.add(decode_job(3, 12.0))
    assert batch_of(jobs) == [1, 2]
    blocks, growing.sequence.block_ids = growing.sequence.block_ids, ()
    assert batch_of(jobs) == [2, 3]
    growing.sequence.block_ids = blocks
    assert batch_of(jobs) == [2, 3], "it has no slot, and less work than half of none"
    jobs.cancel(2)
    assert batch_of(jobs) == [1, 3]
    assert growing.sequence.num_preemptions == 0


def test_a_prompt_is_not_computed_while_the_sequences_that_decode_fill_the_batch() -> None:
    jobs = srtf_scheduler(max_num_seqs=2)
    for job_id in (1, 2, 3):
        jobs.add(decode_job(job_id, 10.0 + job_id))
    jobs.add(job(9, prompt=20))
    assert [chunk[0] for chunk in shape(jobs.next_step(0.0))] == [1, 2]


def test_a_prompt_is_computed_beside_the_batch_as_far_as_the_budget_goes() -> None:
    jobs = srtf_scheduler(max_num_seqs=3)
    for job_id in (1, 2):
        jobs.add(decode_job(job_id, 10.0 + job_id))
    jobs.add(job(9, prompt=20))
    assert shape(jobs.next_step(0.0)) == [(1, 4, 1, True), (2, 4, 1, True), (9, 0, 8, False)]
