"""Outputs of whatever tokens, prompts and stop strings: a text, in which no character is divided."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxmesh.models.tokenizer import TextModel
from muxmesh.types import Finish, FinishReason, Stopping
from router.sequence_output import SequenceOutput
from router.stop_strings import StopStrings
from tests.support.fuzzing import fuzz
from tests.support.tokenizer_kinds import TOKENIZERS

MODELS = {kind: TextModel(tokenizer) for kind, tokenizer in TOKENIZERS.items()}
IDS = st.lists(st.integers(0, 35) | st.integers(0, 300) | st.integers(0, 2**32 - 1), max_size=40)
STOPS = st.lists(st.text("ab \ufffdé日", min_size=1, max_size=4), max_size=5)


@pytest.mark.parametrize("kind", MODELS)
@fuzz(quick=20, part=0.002)
@given(prompt=IDS, token_ids=IDS, stops=STOPS, skip=st.booleans(), include=st.booleans(), step=st.integers(1, 9))
def test_any_output_has_a_text_that_ends_before_its_first_stop_string(
    kind: str, prompt: list[int], token_ids: list[int], stops: list[str], skip: bool, include: bool, step: int
) -> None:
    model = MODELS[kind]
    whole = "".join(map((whole_of := model.detokenizer(skip, prompt)).feed, token_ids)) + whole_of.flush()
    output = SequenceOutput(Stopping(1000), model.detokenizer(skip, prompt), StopStrings(stops, include), include)
    text = ""
    for start in range(0, len(token_ids), step):
        if output.finish is None:
            text += output.append(token_ids[start : start + step]).text
    if output.finish is None:
        text += output.complete(Finish(FinishReason.LENGTH)).text
    assert whole.startswith(text)
    assert "\ufffd" in whole or "\ufffd" not in text
    if output.finish is not None and output.finish.stop_string is not None:
        assert whole[len(text) - include * len(output.finish.stop_string) :].startswith(output.finish.stop_string)
    else:
        assert text == whole and not any(stop in whole for stop in stops)
