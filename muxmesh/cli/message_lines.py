"""What is typed into a chat: lines that become messages, and messages that are commands."""

from __future__ import annotations

import re

QUOTES = '"""'
HELP = """\
/clear   begin a new conversation     /bye, /exit or Ctrl-D   end
/help    show this help

Enter sends, Alt-Enter begins a new line, and pasted lines stay together. A message that begins with \"\"\"
goes on to the next \"\"\". Arrow keys bring back earlier messages, Ctrl-R searches them. Ctrl-C stops the
output, and what was printed stays in the conversation; at the prompt it clears the line."""
ENDS = ("/bye", "/exit", "/quit")
_COMMAND = re.compile(r"/[\w?-]*")


class MessageLines:
    """Joins lines to messages: each line is one, except that three quotes begin a block that the next three end."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    @property
    def is_open(self) -> bool:
        """True within a block."""
        return bool(self._lines)

    def add(self, line: str) -> str | None:
        """Returns the message that ``line`` completes, or None if a block goes on."""
        if not self._lines and not line.lstrip().startswith(QUOTES):
            return line.strip()
        self._lines.append(line if self._lines else line.lstrip().removeprefix(QUOTES))
        if not self._lines[-1].rstrip().endswith(QUOTES):
            return None
        self._lines[-1] = self._lines[-1].rstrip().removesuffix(QUOTES)
        message = "\n".join(self._lines).strip()
        self._lines = []
        return message

    def discard(self) -> None:
        """Forgets a block that has begun."""
        self._lines = []


def command_of(message: str) -> str | None:
    """The command that ``message`` is, or None for text. A path such as /etc/hosts is text, and so are two lines."""
    first = message.split(maxsplit=1)[:1]
    return first[0] if first and "\n" not in message and _COMMAND.fullmatch(first[0]) else None
