import io

import pytest

from muxmesh.cli.main import main
from muxmesh.errors import Overloaded
from tests.support.fake_mesh import FakeMesh, output


def chat(lines: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    return main(["chat", *arguments])


def turns(mesh: FakeMesh) -> list[list[tuple[str, str]]]:
    """The turns of each request that the mesh received."""
    return [[(message.role, message.content) for message in request.chat.messages] for request in mesh.requests]


def test_each_turn_is_sent_with_all_turns_before_it(
    mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat("hi\n  how are you? \n\nnot sent\n", monkeypatch) == 0
    first = [("user", "hi")]
    assert turns(mesh) == [first, [*first, ("assistant", "abc"), ("user", "how are you?")]]
    assert capsys.readouterr().out == "> abc\n> abc\n> "


def test_the_system_message_comes_first(mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chat("hi\n\n", monkeypatch, "--system", "Be brief.") == 0
    assert turns(mesh) == [[("system", "Be brief."), ("user", "hi")]]


@pytest.mark.parametrize("lines", ["", "\n", "   \n"])
def test_an_empty_line_or_the_end_of_input_ends_the_chat(
    mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch, lines: str
) -> None:
    assert chat(lines, monkeypatch) == 0
    assert mesh.requests == []


def test_every_turn_uses_the_sampling_options(mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chat("hi\nagain\n", monkeypatch, "--max-new-tokens", "5", "--seed", "3", "--stop", "end") == 0
    for request in mesh.requests:
        assert (request.stopping.max_new_tokens, request.sampling.seed) == (5, 3)
        assert list(request.stopping.stop_strings) == ["end"]
    assert len(mesh.requests) == 2


def test_an_error_of_the_mesh_ends_the_chat(
    mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mesh.script = [*output("abc")[:1], Overloaded("40 requests wait")]
    assert chat("hi\nnot sent\n", monkeypatch) == 1
    printed = capsys.readouterr()
    assert printed.out == "> a\n"
    assert printed.err == "muxmesh: 40 requests wait\n"
    assert len(mesh.requests) == 1


def test_ctrl_c_at_the_prompt_ends_with_130(mesh: FakeMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(prompt: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    assert main(["chat"]) == 130
    assert mesh.requests == []
