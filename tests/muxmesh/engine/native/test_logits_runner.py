"""The runner over a forward pass that returns chosen logits, without a model."""

from collections.abc import Callable

import numpy as np
import pytest

from muxmesh.device.kv_view import KvView
from muxmesh.engine.api import Failed
from muxmesh.engine.native.logits_runner import LogitsRunner
from muxmesh.engine.native.step_layout import StepLayout
from muxmesh.engine.step import Chunk, PromptScoring, SampleSpec, Step, StepOutcome
from muxmesh.engine.token_sampler import token_logprobs
from muxmesh.errors import SequenceFailed
from muxmesh.models.model_spec import SIM_SPEC
from muxmesh.types import Sampling
from tests.support.tiny import tiny_view

VOCAB = 12
GREEDY = SampleSpec(Sampling(temperature=0.0), 0)


class SuccessorForward:
    """A forward pass over a chain of tokens: the most likely token after ``t`` is ``t + 1``."""

    def __init__(self) -> None:
        self.layouts: list[StepLayout] = []

    def rest(self) -> None: ...

    def logits(self, layout: StepLayout) -> np.ndarray:
        self.layouts.append(layout)
        return successor_logits(layout.token_ids[layout.logit_rows])


def successor_logits(token_ids: np.ndarray) -> np.ndarray:
    rows = np.random.default_rng(0).standard_normal((1, VOCAB)).astype(np.float32).repeat(len(token_ids), axis=0)
    rows[np.arange(len(token_ids)), token_ids + 1] = 10.0
    return rows


@pytest.fixture
def view() -> KvView:
    return tiny_view(SIM_SPEC)


@pytest.fixture
def forward() -> SuccessorForward:
    return SuccessorForward()


@pytest.fixture
def run(view: KvView, forward: SuccessorForward) -> Callable[..., dict[int, int]]:
    """Runs a step; returns the sampled token of each job."""
    runner = LogitsRunner(view, lambda opened: forward)
    runner.load()
    return lambda *chunks: {job: token.token_id for job, (token,) in runner.run(Step(chunks)).sampled.items()}


def test_loading_opens_the_forward_pass_once_over_the_pool(view: KvView, forward: SuccessorForward) -> None:
    opened: list[KvView] = []

    def open_forward(pool_view: KvView) -> SuccessorForward:
        opened.append(pool_view)
        return forward

    runner = LogitsRunner(view, open_forward)
    assert opened == []
    runner.load()
    assert len(opened) == 1 and opened[0] is view


def test_the_token_after_the_last_row_of_a_chunk_is_sampled(run: Callable[..., dict[int, int]]) -> None:
    assert run(Chunk(5, 0, (1, 2, 3), (0,), GREEDY)) == {5: 4}


def test_each_chunk_samples_from_its_own_row(run: Callable[..., dict[int, int]]) -> None:
    chunks = (Chunk(5, 0, (1, 2), (0,), GREEDY), Chunk(6, 4, (9,), (1,), GREEDY), Chunk(7, 9, (0,), (2,), GREEDY))
    assert run(*chunks) == {5: 3, 6: 10, 7: 1}


def test_a_chunk_without_a_sample_gives_no_token(run: Callable[..., dict[int, int]]) -> None:
    assert run(Chunk(5, 0, (1, 2), (0,)), Chunk(6, 4, (9,), (1,), GREEDY), Chunk(7, 0, (3,), (2,))) == {6: 10}


def test_a_step_without_logits_is_still_computed(run: Callable[..., dict[int, int]], forward: SuccessorForward) -> None:
    assert run(Chunk(5, 0, (1, 2), (0,))) == {}
    assert [layout.token_ids.tolist() for layout in forward.layouts] == [[1, 2]]


def test_the_sampling_of_the_chunk_is_applied(run: Callable[..., dict[int, int]]) -> None:
    banned = SampleSpec(Sampling(temperature=0.0), 0, banned=frozenset({4}))
    assert run(Chunk(5, 0, (3,), (0,), banned))[5] != 4


@pytest.fixture
def runner(view: KvView, forward: SuccessorForward) -> LogitsRunner:
    runner = LogitsRunner(view, lambda opened: forward)
    runner.load()
    return runner


def test_log_probabilities_of_a_sampled_token_are_those_of_its_row(runner: LogitsRunner) -> None:
    spec = SampleSpec(Sampling(temperature=0.0, logprobs=2), 0)
    outcome = runner.run(Step((Chunk(4, 0, (1,), (1,)), Chunk(5, 0, (3,), (0,), spec))))
    assert outcome.sampled[5][0].logprobs == token_logprobs(successor_logits(np.array([3]))[0], 4, 2)


def test_each_token_of_a_scored_chunk_is_scored_by_the_row_before_it(runner: LogitsRunner) -> None:
    chunk = Chunk(5, 0, (1, 2, 3), (0,), None, PromptScoring((2, 8, 4), 1))
    outcome = runner.run(Step((Chunk(4, 0, (6,), (1,), GREEDY), chunk)))
    rows = successor_logits(np.array([1, 2, 3]))
    assert outcome.prompt_logprobs == {
        5: tuple(token_logprobs(row, token, 1) for row, token in zip(rows, (2, 8, 4), strict=True))
    }
    assert [scored.chosen.rank == 1 for scored in outcome.prompt_logprobs[5]] == [True, False, True]
    assert outcome.sampled[4][0].token_id == 7


def test_the_last_chunk_of_a_scored_prompt_is_scored_and_sampled(runner: LogitsRunner) -> None:
    chunk = Chunk(5, 0, (1, 2, 3), (0,), GREEDY, PromptScoring((2, 3), 0))
    outcome = runner.run(Step((chunk,)))
    assert len(outcome.prompt_logprobs[5]) == 2
    assert outcome.sampled[5][0].token_id == 4


def test_a_step_reports_the_kv_bytes_of_all_its_tokens(runner: LogitsRunner, view: KvView) -> None:
    outcome = runner.run(Step((Chunk(4, 0, (1, 2, 3), (1,)), Chunk(5, 0, (3,), (0,), GREEDY))))
    assert outcome.kv_bytes_written == 4 * view.shape.kv_bytes_per_token


class ChosenForward:
    """A forward pass that returns these rows for the first step."""

    def __init__(self, *rows: list[float]) -> None:
        self._rows = np.array(rows, dtype=np.float32)

    def rest(self) -> None: ...

    def logits(self, layout: StepLayout) -> np.ndarray:
        return self._rows[: len(layout.logit_rows)]


SOUND = [0.0, 3.0, 1.0]
NOT_FINITE = {
    "NaN": [0.0, np.nan, 1.0],
    "inf": [0.0, 5.0, np.inf],
    "NaN beside -inf": [-np.inf, -np.inf, np.nan],
    "only -inf": [-np.inf] * 3,
}


def outcome_of(view: KvView, step: Step, *rows: list[float]) -> StepOutcome:
    runner = LogitsRunner(view, lambda opened: ChosenForward(*rows))
    runner.load()
    return runner.run(step)


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0), Sampling(seed=3, top_k=2, logprobs=1)])
@pytest.mark.parametrize("row", NOT_FINITE.values(), ids=NOT_FINITE.keys())
def test_logits_that_are_not_finite_fail_their_sequence_only(
    view: KvView, row: list[float], sampling: Sampling
) -> None:
    spec = SampleSpec(sampling, 0)
    step = Step((Chunk(4, 0, (1, 2), (0,), spec), Chunk(5, 7, (2, 3), (1,), spec), Chunk(6, 0, (1,), (2,), spec)))
    outcome = outcome_of(view, step, SOUND, row, SOUND)
    assert outcome.sampled.keys() == {4, 6}
    assert outcome.failed.keys() == {5} and outcome.failed[5].kind is SequenceFailed
    assert "logits that are not finite after the token at position 8;" in outcome.failed[5].reason


def test_a_token_with_the_logit_minus_infinity_is_never_sampled_and_fails_nothing(view: KvView) -> None:
    outcome = outcome_of(view, Step((Chunk(4, 0, (1,), (0,), SampleSpec(Sampling(seed=1), 0)),)), [-np.inf, -np.inf, 1])
    assert (outcome.sampled[4][0].token_id, outcome.failed) == (2, {})


def test_a_prompt_is_not_scored_by_logits_that_are_not_finite(view: KvView) -> None:
    scored = Chunk(5, 4, (1, 2, 3), (0,), None, PromptScoring((2, 0, 1), 1))
    outcome = outcome_of(view, Step((scored,)), SOUND, NOT_FINITE["NaN"], SOUND)
    assert outcome.prompt_logprobs == {} and "at position 5;" in outcome.failed[5].reason


def test_a_request_that_leaves_no_token_fails_by_name(view: KvView) -> None:
    spec = SampleSpec(Sampling(allowed_token_ids=(1,)), 3, banned=frozenset({1}))
    outcome = outcome_of(view, Step((Chunk(4, 0, (1,), (0,), spec), Chunk(5, 0, (1,), (1,), GREEDY))), SOUND, SOUND)
    assert outcome.failed == {
        4: Failed("no token may be sampled at output index 3: every logit is -inf", SequenceFailed)
    }
    assert outcome.sampled[5][0].token_id == 1
