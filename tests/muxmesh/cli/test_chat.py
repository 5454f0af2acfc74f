"""`muxmesh chat` without a terminal: each line of standard input is a message."""

import io

import grpc
import pytest

from muxmesh.cli.main import main
from muxmesh.errors import InvalidRequest, Overloaded
from tests.support.fake_mesh import FakeMesh, output


def chat(lines: str | bytes, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    content = lines if isinstance(lines, bytes) else lines.encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    return main(["chat", *arguments])


def turns(mesh: FakeMesh) -> list[list[tuple[str, str]]]:
    """The turns of each request that the mesh received."""
    return [[(message.role, message.content) for message in request.chat.messages] for request in mesh.requests]


def test_each_line_is_sent_with_all_turns_before_it(
    mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat("hi\n\n  how are you? \r\n", monkeypatch) == 0
    first = [("user", "hi")]
    assert turns(mesh) == [first, [*first, ("assistant", "abc"), ("user", "how are you?")]]
    assert capsys.readouterr().out == "abc\nabc\n"


def test_the_system_message_comes_first(mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chat("hi", monkeypatch, "--system", "Be brief.") == 0
    assert turns(mesh) == [[("system", "Be brief."), ("user", "hi")]]


def test_lines_between_three_quotes_are_one_message(mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chat('"""one\ntwo\n"""\n', monkeypatch) == 0
    assert turns(mesh) == [[("user", "one\ntwo")]]


def test_three_quotes_without_an_end_are_an_error(
    mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat('"""one\ntwo\n', monkeypatch) == 1
    assert 'standard input: the message that begins with """ has no end' in capsys.readouterr().err
    assert mesh.requests == []


@pytest.mark.parametrize("lines", ["", "\n", "   \n", "/bye\nnot sent\n", "/exit\n"])
def test_the_end_of_input_or_a_command_ends_the_chat(
    mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch, lines: str
) -> None:
    assert chat(lines, monkeypatch) == 0
    assert mesh.requests == []


def test_clear_forgets_all_turns_but_the_system_message(mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chat("hi\n/clear\nagain\n", monkeypatch, "--system", "s") == 0
    assert turns(mesh) == [[("system", "s"), ("user", "hi")], [("system", "s"), ("user", "again")]]


def test_an_unknown_command_is_an_error_and_a_path_is_a_message(
    mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat("/etc/hosts is what?\n/nope\n", monkeypatch) == 1
    assert turns(mesh) == [[("user", "/etc/hosts is what?")]]
    assert "muxmesh: /nope is not a command; /help lists them" in capsys.readouterr().err


def test_every_turn_uses_the_sampling_options(mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chat("hi\nagain\n", monkeypatch, "--max-new-tokens", "5", "--seed", "3", "--stop", "end") == 0
    for request in mesh.requests:
        assert (request.stopping.max_new_tokens, request.sampling.seed) == (5, 3)
        assert list(request.stopping.stop_strings) == ["end"]
    assert len(mesh.requests) == 2


@pytest.mark.parametrize(
    ("error", "message"),
    [(Overloaded("40 requests wait"), "40 requests wait"), (grpc.StatusCode.UNAVAILABLE, "the router was lost")],
)
def test_an_error_ends_a_chat_without_a_terminal(
    mesh: FakeMesh,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception | grpc.StatusCode,
    message: str,
) -> None:
    mesh.script = [*output("abc")[:1], error]
    assert chat("hi\nnot sent\n", monkeypatch) == 1
    printed = capsys.readouterr()
    assert printed.out == "a\n"
    assert printed.err.startswith(f"muxmesh: {message}") and printed.err.count("\n") == 1
    assert len(mesh.requests) == 1


def test_bytes_that_are_no_text_are_an_error(
    mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(b"hi\n\xff\n", monkeypatch) == 1
    assert "muxmesh: standard input: is not UTF-8 text: " in capsys.readouterr().err
    assert len(mesh.requests) == 1


def test_the_model_is_chosen_before_any_input_is_read(
    mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mesh.models = ["a", "b", "plain"]
    mesh.without_chat_template = {"plain"}
    for arguments, error in (
        ([], "--model: is needed, because the mesh serves several; one of: a, b"),
        (["--model", "c"], "--model: the mesh does not serve 'c'; it serves a, b, plain"),
        (["--model", "plain"], "--model: plain has no chat template; use `muxmesh generate`"),
    ):
        assert chat("hi\n", monkeypatch, *arguments) == 1
        assert capsys.readouterr().err == f"muxmesh: {error}\n"
    assert chat("hi\n", monkeypatch, "--model", "b") == 0
    mesh.models = ["plain", "b"]
    assert chat("hi\n", monkeypatch) == 0
    assert [request.model for request in mesh.requests] == ["b", "b"]


def test_a_chat_with_a_mesh_that_is_absent_ends_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat("hi\n", monkeypatch, "--address", "127.0.0.1:1") == 1
    assert "no mesh answers at 127.0.0.1:1" in capsys.readouterr().err


def test_a_conversation_that_is_too_long_is_reported_as_the_mesh_says(
    mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mesh.script = [InvalidRequest("chat", "is 5000 tokens; the context holds 2048, at least 1 for the output")]
    assert chat("hi\n", monkeypatch) == 1
    assert "muxmesh: chat: is 5000 tokens; the context holds 2048" in capsys.readouterr().err
