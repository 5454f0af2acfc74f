"""What a step computes, counted."""

import pytest

from muxmesh.engine.step import Chunk, PromptScoring, SampleSpec, Step
from muxmesh.step_cost import StepShape
from muxmesh.types import Sampling

SAMPLE = SampleSpec(Sampling(), 0)
SCORING = PromptScoring((11, 12), 3)


def chunk(start: int, num_tokens: int, sample: SampleSpec | None = None, scoring: PromptScoring | None = None) -> Chunk:
    return Chunk(1, start, tuple(range(num_tokens)), (0,), sample, scoring)


@pytest.mark.parametrize(
    ("sample", "scoring", "num_rows"),
    [(None, None, 0), (SAMPLE, None, 1), (None, SCORING, 5), (SAMPLE, SCORING, 5)],
    ids=["neither", "sampled", "scored", "both"],
)
def test_logits_are_needed_of_the_last_token_to_sample_and_of_all_tokens_to_score(
    sample: SampleSpec | None, scoring: PromptScoring | None, num_rows: int
) -> None:
    assert chunk(0, 5, sample, scoring).num_logit_rows == num_rows


def test_the_shape_of_a_step_adds_up_its_chunks() -> None:
    step = Step((chunk(0, 4), chunk(10, 1), chunk(100, 3)))
    context = (0 + 1 + 2 + 3) + 10 + (100 + 101 + 102)
    assert step.num_tokens == 8
    assert step.shape == StepShape(num_tokens=8, num_context=context, num_seqs=3)


def test_a_prompt_in_chunks_attends_to_as_much_as_in_one() -> None:
    whole = Step((chunk(0, 30),)).shape.num_context
    assert sum(Step((chunk(start, 10),)).shape.num_context for start in (0, 10, 20)) == whole


def test_an_empty_step_has_no_tokens() -> None:
    assert Step(()).shape == StepShape(0, 0, 0)
