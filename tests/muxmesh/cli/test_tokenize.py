import io
import json

import pytest

from muxmesh.cli.main import main
from muxmesh.v1 import inference_pb2
from tests.support.fake_mesh import FakeMesh


def tokenize(*arguments: str) -> int:
    return main(["tokenize", *arguments])


def test_each_token_is_a_line_and_a_part_of_a_character_is_shown_as_bytes(
    mesh: FakeMesh, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tokenize("a\né") == 0
    printed = capsys.readouterr()
    assert printed.out == "     97 'a'\n     10 '\\n'\n    233 b'\\xe9'\n"
    assert printed.err == "[3 tokens; the context holds 100]\n"


def test_json_has_ids_texts_and_bytes(mesh: FakeMesh, capsys: pytest.CaptureFixture[str]) -> None:
    assert tokenize("--json", "aé") == 0
    assert json.loads(capsys.readouterr().out) == {
        "token_ids": [97, 233],
        "num_tokens": 2,
        "max_model_len": 100,
        "token_texts": ["a", "\ufffd"],
        "token_bytes": [[97], [0xE9]],
    }


def test_arguments_reach_the_mesh(mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"from stdin")))
    assert tokenize("--model", "m", "--no-special-tokens", "-") == 0
    assert tokenize("--chat", "hi") == 0
    assert mesh.token_requests == [
        inference_pb2.TokenizeRequest(model="m", text="from stdin", add_special_tokens=False, token_texts=True),
        inference_pb2.TokenizeRequest(
            chat=inference_pb2.ChatPrompt(messages=[inference_pb2.ChatMessage(role="user", content="hi")]),
            token_texts=True,
        ),
    ]


@pytest.mark.parametrize("token_ids", ["104 105", "104,105", "104, 105\n", "[104, 105]\n"])
def test_token_ids_are_decoded(mesh: FakeMesh, capsys: pytest.CaptureFixture[str], token_ids: str) -> None:
    assert tokenize("--decode", token_ids) == 0
    assert capsys.readouterr().out == "hi\n"
    assert tokenize("--decode", "--json", token_ids) == 0
    assert json.loads(capsys.readouterr().out) == {"text": "hi"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--decode", "12 x"), "token_ids: 'x' is not a whole number; token ids are separated by spaces or commas"),
        (("--decode", "--chat", "12"), "chat: --decode takes token ids, no conversation"),
        (("--decode", "-1"), "token_ids: "),
    ],
)
def test_what_are_no_token_ids_is_refused(
    mesh: FakeMesh, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert tokenize(*arguments[:-1], "--", arguments[-1]) == 1
    assert capsys.readouterr().err.startswith(f"muxmesh: {message}")
