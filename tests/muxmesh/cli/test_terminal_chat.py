"""`muxmesh chat` on a terminal: what the keys do, and what leaves the conversation standing."""

import asyncio
from pathlib import Path

import grpc
import pytest
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from muxmesh.cli.command_parser import command_parser
from muxmesh.cli.line_editor import LineEditor
from muxmesh.cli.terminal_chat import TerminalChat
from muxmesh.errors import InvalidRequest, Overloaded
from tests.support.fake_mesh import FakeMesh, output
from tests.support.terminal import Terminal, on_terminal

PASTE, END_OF_PASTE = "\x1b[200~", "\x1b[201~"
CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"


def typed(keys: str, *arguments: str) -> int:
    """The exit code of a chat in which these keys are typed at its prompts."""
    with create_pipe_input() as keyboard:
        keyboard.send_text(keys)
        editor = LineEditor(InMemoryHistory(), keyboard, DummyOutput())
        return asyncio.run(TerminalChat(command_parser().parse_args(["chat", *arguments]), editor).run())


def turns(mesh: FakeMesh) -> list[list[tuple[str, str]]]:
    return [[(message.role, message.content) for message in request.chat.messages] for request in mesh.requests]


def sent(mesh: FakeMesh) -> list[str]:
    """The last turn of each request."""
    return [messages[-1][1] for messages in turns(mesh)]


@pytest.mark.parametrize("end", ["/bye\r", "/exit\r", " /bye \r", CTRL_D])
def test_a_command_or_ctrl_d_ends_the_chat(mesh: FakeMesh, end: str) -> None:
    assert typed(f"hi\r{end}not sent\r") == 0
    assert sent(mesh) == ["hi"]


def test_each_message_is_sent_with_the_conversation_before_it(mesh: FakeMesh) -> None:
    assert typed(f"hi\ragain\r{CTRL_D}", "--system", "s") == 0
    begin = [("system", "s"), ("user", "hi")]
    assert turns(mesh) == [begin, [*begin, ("assistant", "abc"), ("user", "again")]]


def test_pasted_lines_are_one_message(mesh: FakeMesh) -> None:
    assert typed(f"{PASTE}one\rtwo\n\nfour{END_OF_PASTE} five\r{CTRL_D}") == 0
    assert sent(mesh) == ["one\ntwo\n\nfour five"]


@pytest.mark.parametrize("keys", ["one\x1b\rtwo\r", '"""one\rtwo"""\r', '"""\rone\rtwo\r"""\r'])
def test_alt_enter_and_three_quotes_make_a_message_of_several_lines(mesh: FakeMesh, keys: str) -> None:
    assert typed(keys + CTRL_D) == 0
    assert sent(mesh) == ["one\ntwo"]


def test_empty_lines_are_not_sent(mesh: FakeMesh) -> None:
    assert typed(f"\r   \rhi\r{CTRL_D}") == 0
    assert sent(mesh) == ["hi"]


def test_ctrl_c_clears_the_line_and_a_block_that_has_begun(mesh: FakeMesh, capsys: pytest.CaptureFixture[str]) -> None:
    assert typed(f'wrong{CTRL_C}right\r"""block{CTRL_C}"""block\rmore{CTRL_C}after\r{CTRL_C}{CTRL_D}') == 0
    assert sent(mesh) == ["right", "after"]
    assert capsys.readouterr().err.count("(/bye or Ctrl-D ends the chat)") == 1, "only where there was nothing to clear"


def test_clear_forgets_the_conversation(mesh: FakeMesh) -> None:
    assert typed(f"hi\r/clear\ragain\r{CTRL_D}") == 0
    assert turns(mesh)[-1] == [("user", "again")]


def test_help_and_unknown_commands_are_answered_here(mesh: FakeMesh, capsys: pytest.CaptureFixture[str]) -> None:
    assert typed(f"/help\r/nope\r{CTRL_D}") == 0
    printed = capsys.readouterr().err
    assert "/clear   begin a new conversation" in printed
    assert "muxmesh: /nope is not a command; /help lists them" in printed
    assert mesh.requests == []


@pytest.mark.parametrize(
    "script",
    [
        [Overloaded("40 requests wait")],
        [*output("xyz")[:2], Overloaded("40 requests wait")],
        [*output("xyz")[:2], grpc.StatusCode.UNAVAILABLE],
        [InvalidRequest("chat", "is 5000 tokens; the context holds 2048")],
    ],
)
def test_an_error_leaves_the_conversation_as_it_was_before_the_message(
    mesh: FakeMesh, capsys: pytest.CaptureFixture[str], script: list[object]
) -> None:
    mesh.scripts = [output("abc"), script, output("abc")]  # type: ignore[list-item]
    assert typed(f"hi\rfails\ragain\r{CTRL_D}") == 0
    conversation = [("user", "hi"), ("assistant", "abc")]
    assert turns(mesh)[1:] == [[*conversation, ("user", "fails")], [*conversation, ("user", "again")]]
    printed = capsys.readouterr().err
    assert "muxmesh: " in printed and "(the conversation is kept" in printed


def test_a_conversation_that_is_too_long_can_be_cleared(mesh: FakeMesh, capsys: pytest.CaptureFixture[str]) -> None:
    mesh.scripts = [output("abc"), [InvalidRequest("chat", "is 5000 tokens; the context holds 2048")]]
    assert typed(f"hi\rlong\r/clear\rlong\r{CTRL_D}") == 0
    assert turns(mesh)[-1] == [("user", "long")]
    printed = capsys.readouterr().err
    assert "muxmesh: chat: is 5000 tokens; the context holds 2048\n" in printed
    assert "(the conversation is kept without this message; /clear begins a new one)\n" in printed


def test_a_model_is_chosen_by_number_or_name_before_the_first_message(
    mesh: FakeMesh, capsys: pytest.CaptureFixture[str]
) -> None:
    mesh.models = ["a", "b", "c"]
    assert typed(f"4\rnone\r2\rhi\r{CTRL_D}") == 0
    printed = capsys.readouterr().err
    assert "(4 is not one of them)" in printed and "(none is not one of them)" in printed
    assert typed(f"c\rhi\r{CTRL_D}") == 0
    assert typed(f"hi\r{CTRL_D}", "--model", "a") == 0
    assert [request.model for request in mesh.requests] == ["b", "c", "a"]


@pytest.mark.parametrize("key", [CTRL_C, CTRL_D])
def test_ctrl_c_or_ctrl_d_instead_of_a_model_ends_the_program(mesh: FakeMesh, key: str) -> None:
    mesh.models = ["a", "b"]
    with pytest.raises(KeyboardInterrupt):
        typed(key)


# --- with a terminal, as a person uses it ---


def await_prompt(terminal: Terminal) -> None:
    """Waits until a line can be typed: bracketed paste is on, and the cursor is shown."""
    terminal.read_until("\x1b[?2004h")
    terminal.read_until("\x1b[?25h")


def test_several_pasted_lines_are_sent_as_one_message_and_none_reaches_the_shell(
    mesh: FakeMesh, tmp_path: Path
) -> None:
    mesh.script = output("Yes.")
    with on_terminal("chat", MUXMESH_STATE_DIR=str(tmp_path)) as terminal:
        await_prompt(terminal)
        terminal.type(f"{PASTE}echo one\rrm two\rls three{END_OF_PASTE}")
        terminal.read_until("three")
        terminal.type("\r")
        terminal.read_until("Yes.")
        await_prompt(terminal)
        terminal.type("/bye\r")
        assert terminal.exit_code() == 0
    assert sent(mesh) == ["echo one\nrm two\nls three"]


def test_ctrl_c_stops_the_output_and_keeps_what_was_printed(mesh: FakeMesh, tmp_path: Path) -> None:
    mesh.scripts = [[*output("XYZ")[:2], asyncio.Event()]]
    with on_terminal("chat", MUXMESH_STATE_DIR=str(tmp_path)) as terminal:
        await_prompt(terminal)
        terminal.type("hi\r")
        terminal.read_until("XY")
        terminal.type(CTRL_C)
        terminal.read_until("(stopped)")
        mesh.wait_until(lambda mesh: mesh.num_ended == 1)
        await_prompt(terminal)
        terminal.type("again\r")
        terminal.read_until("finish: ")
        await_prompt(terminal)
        terminal.type(CTRL_D)
        assert terminal.exit_code() == 0
    assert turns(mesh)[1] == [("user", "hi"), ("assistant", "XY"), ("user", "again")]


def test_arrow_up_brings_back_a_message_of_an_earlier_chat_unless_its_history_was_off(
    mesh: FakeMesh, tmp_path: Path
) -> None:
    for keys, arguments in (("secret\r", ["--no-history"]), ("first\r", []), (f"{UP}{UP}\r", [])):
        with on_terminal("chat", *arguments, MUXMESH_STATE_DIR=str(tmp_path)) as terminal:
            await_prompt(terminal)
            terminal.type(keys)
            terminal.read_until("finish: ")
            await_prompt(terminal)
            terminal.type("/bye\r")
            assert terminal.exit_code() == 0
    assert sent(mesh) == ["secret", "first", "first"]
    assert (tmp_path / "chat_history").stat().st_mode & 0o777 == 0o600


def test_escape_sequences_of_a_model_do_not_control_the_terminal(mesh: FakeMesh, tmp_path: Path) -> None:
    mesh.script = output("X\x1b]0;title\x07Y\x9bZ")
    for arguments in (["generate", "hi"], ["generate", "--json", "hi"]):
        with on_terminal(*arguments, MUXMESH_STATE_DIR=str(tmp_path)) as terminal:
            shown = terminal.read_all()
        assert "X" in shown and not {"\x1b", "\x07", "\x9b"} & set(shown)


def test_ctrl_c_ends_other_commands_with_130_and_without_a_traceback(mesh: FakeMesh) -> None:
    mesh.script = [*output("XY")[:1], asyncio.Event()]
    with on_terminal("generate", "hi") as terminal:
        terminal.read_until("X")
        terminal.type(CTRL_C)
        assert "Traceback" not in terminal.read_all()
        assert terminal.exit_code() == 130
