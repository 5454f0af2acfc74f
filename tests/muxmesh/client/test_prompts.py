"""Every kind of prompt in its field, and prompts that are none."""

from typing import Any

import numpy as np
import pytest

from muxmesh.client import Message
from muxmesh.client.prompts import set_prompt
from muxmesh.errors import InvalidRequest
from muxmesh.v1 import inference_pb2

TURN = {"role": "user", "content": "x"}
HI = {"chat": {"messages": [{"role": "user", "content": "hi"}]}}


@pytest.mark.parametrize(
    ("prompt", "fields"),
    [
        ("", {"text": ""}),
        ("text", {"text": "text"}),
        ([5, 6], {"token_ids": {"ids": [5, 6]}}),
        ((), {"token_ids": {}}),
        (range(2), {"token_ids": {"ids": [0, 1]}}),
        (np.array([5, 6]), {"token_ids": {"ids": [5, 6]}}),
        ([Message("user", "hi")], HI),
        ([{"role": "user", "content": "hi"}], HI),
        (({"role": "user", "content": "hi"},), HI),
        (
            [Message("system", ""), {"content": "hi", "role": "user"}],
            {"chat": {"messages": [{"role": "system"}, {"role": "user", "content": "hi"}]}},
        ),
    ],
)
def test_a_prompt_is_sent_in_the_field_of_its_kind(prompt: Any, fields: dict[str, Any]) -> None:
    request = inference_pb2.GenerateRequest()
    set_prompt(request, prompt)
    assert request == inference_pb2.GenerateRequest(**fields)


ONE_OF = "text, token ids or a list of messages is needed"
UTF8 = "text that UTF-8 can encode is needed"
ID = "a whole number from 0 to 4294967295 is needed"


@pytest.mark.parametrize(
    ("prompt", "field", "problem"),
    [
        (None, "prompt", f"is None; {ONE_OF}"),
        (5, "prompt", f"is 5; {ONE_OF}"),
        (np.array(5), "prompt", f"is array(5); {ONE_OF}"),
        (b"text", "prompt", f"is b'text'; {ONE_OF}"),
        (bytearray(b"text"), "prompt", f"is bytearray(b'text'); {ONE_OF}"),
        ({1, 2}, "prompt", f"is {{1, 2}}; {ONE_OF}"),
        ("\ud800", "prompt", f"is '\\ud800'; {UTF8}"),
        (["a", "b"], "prompt", f"has 'a' at index 0; {ONE_OF}"),
        ([1, "a"], "prompt", f"has 'a' at index 1; {ONE_OF}"),
        ([1, TURN], "prompt", f"has {TURN!r} at index 1; {ONE_OF}"),
        ([1.5], "prompt[0]", f"is 1.5; {ID}"),
        ([1, True], "prompt[1]", f"is True; {ID}"),
        ([-1], "prompt[0]", f"is -1; {ID}"),
        ([1, 1 << 32], "prompt[1]", f"is 4294967296; {ID}"),
        (Message("user", "x"), "prompt", "is one message; a list of messages is needed"),
        (TURN, "prompt", "is one message; a list of messages is needed"),
        ([Message("user", "x"), 1], "prompt[1]", 'is 1; a Message or {"role", "content"} is needed'),
        ([Message("user", 5)], "prompt[0].content", "is 5; a string is needed"),  # type: ignore[arg-type]
        ([{"role": None, "content": "x"}], "prompt[0].role", "is None; a string is needed"),
        ([{"role": "user"}], "prompt[0]", "has the keys ['role']; exactly \"role\" and \"content\" are needed"),
        (
            [Message("user", "x"), {"role": "user", "content": "x", "name": "n"}],
            "prompt[1]",
            "has the keys ['role', 'content', 'name']; exactly \"role\" and \"content\" are needed",
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
            "prompt[0].content",
            "is [{'type': 'text', 'text': 'x'}]; a string is needed",
        ),
        ([{"role": "user", "content": "\udfff"}], "prompt[0].content", f"is '\\udfff'; {UTF8}"),
    ],
)  # fmt: skip
def test_a_prompt_that_cannot_be_sent_is_refused_with_the_part_that_is_wrong(
    prompt: Any, field: str, problem: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        set_prompt(inference_pb2.GenerateRequest(), prompt)
    assert (caught.value.field, caught.value.problem) == (field, problem)
