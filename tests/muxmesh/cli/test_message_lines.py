import pytest

from muxmesh.cli.message_lines import MessageLines, command_of


def messages(*lines: str) -> list[str | None]:
    reader = MessageLines()
    return [reader.add(line) for line in lines]


def test_each_line_is_a_message_without_the_blanks_around_it() -> None:
    assert messages("hi", "  how are you?\t", "", "two\npasted lines\n") == [
        "hi", "how are you?", "", "two\npasted lines",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (['"""one', "two", 'three"""'], "one\ntwo\nthree"),
        (['"""', "  one", "", 'two "quoted" ""', '"""'], 'one\n\ntwo "quoted" ""'),
        (['"""one line"""'], "one line"),
        (['  """ one', 'two """  '], "one\ntwo"),
        (['"""/bye', '"""'], "/bye"),
        (['"""one\ntwo pasted lines', 'end"""'], "one\ntwo pasted lines\nend"),
        (['""""""'], ""),
    ],
)
def test_three_quotes_begin_a_message_that_goes_on_to_the_next_three(lines: list[str], expected: str) -> None:
    assert messages(*lines, "after") == [None] * (len(lines) - 1) + [expected, "after"]


def test_a_block_can_be_discarded() -> None:
    reader = MessageLines()
    assert reader.add('"""one') is None and reader.is_open
    reader.discard()
    assert not reader.is_open and reader.add("two") == "two"


@pytest.mark.parametrize("message", ["/bye", "/clear", "/?", "/no-such", "/", "/bye now"])
def test_a_slash_and_a_word_is_a_command(message: str) -> None:
    assert command_of(message) == message.split(maxsplit=1)[0]


@pytest.mark.parametrize("message", ["", "bye", "/etc/hosts: what is it?", "/bye\nsecond line", "a /bye", "//comment"])
def test_other_text_is_no_command(message: str) -> None:
    assert command_of(message) is None
