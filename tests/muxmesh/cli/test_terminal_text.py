import io
import os

import pytest

from muxmesh.cli.terminal_text import harmless

EVIL = "a\x1b]0;title\x07b\x9b31mc\r\x00\x7fd\te\n"


def test_on_a_terminal_control_characters_are_visible_signs() -> None:
    controller, terminal = os.openpty()
    with open(terminal, "w") as stream:
        shown = harmless(EVIL, stream)
    os.close(controller)
    assert shown == "a␛]0;title␇b\\x9b31mc␍␀␡d\te\n"
    assert not [char for char in shown if (char < " " and char not in "\t\n") or "\x7f" <= char < "\xa0"]


def test_elsewhere_the_text_is_unchanged() -> None:
    assert harmless(EVIL, io.StringIO()) == EVIL


@pytest.mark.parametrize("text", ["", "naïve café — 日本語 🙂", "שלום\u200f"])
def test_text_of_any_language_is_unchanged(text: str) -> None:
    controller, terminal = os.openpty()
    with open(terminal, "w") as stream:
        assert harmless(text, stream) == text
    os.close(controller)
