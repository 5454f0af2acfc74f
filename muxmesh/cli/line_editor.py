"""The line editor of `muxmesh chat`: editing keys, pasted text, and a history that only its owner may read."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input import Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import Output, create_output
from prompt_toolkit.output.vt100 import Vt100_Output

from muxmesh.cli.common import default_state_dir

_MAX_HISTORY_BYTES = 1 << 20


class LineCleared(Exception):
    """Ctrl-C at the prompt. ``was_empty``: there was nothing to clear."""

    def __init__(self, was_empty: bool) -> None:
        super().__init__()
        self.was_empty = was_empty


class LineEditor:
    """Reads messages from a terminal. A message has several lines if they were pasted or typed with Alt-Enter."""

    def __init__(self, history: History, source: Input | None = None, screen: Output | None = None) -> None:
        """``source`` and ``screen``: None is the terminal."""
        screen = screen or create_output(always_prefer_tty=True)
        if isinstance(screen, Vt100_Output):
            screen.enable_cpr = False  # a prompt of a few lines needs no report of the cursor position
        self._session: PromptSession[str] = PromptSession(
            history=history, key_bindings=_keys(), prompt_continuation="  ", input=source, output=screen
        )

    async def read(self, prompt: str) -> str | None:
        """Returns what was entered, or None at the end of input. Raises LineCleared."""
        try:
            return await self._session.prompt_async(prompt, handle_sigint=False)
        except EOFError:
            return None
        except KeyboardInterrupt:
            raise LineCleared(not self._session.default_buffer.text) from None


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def open_history(is_kept: bool) -> History:
    """The history of earlier chats in the state directory; one of this chat alone if it is not or cannot be kept."""
    if not is_kept:
        return InMemoryHistory()
    path = default_state_dir() / "chat_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
        path.chmod(0o600)
        _shorten(path)
    except OSError as error:
        print(f"muxmesh: earlier messages are not available: {error}", file=sys.stderr)
        return InMemoryHistory()
    return PrivateHistory(path)


def _shorten(path: Path) -> None:
    """Drops the older half of a file that has grown too long."""
    if path.stat().st_size > _MAX_HISTORY_BYTES:
        newer = path.read_bytes()[-_MAX_HISTORY_BYTES // 2 :]
        path.write_bytes(newer[newer.find(b"\n# ") :])


class PrivateHistory(FileHistory):
    """A history whose file may fail without harm to the chat."""

    def load_history_strings(self) -> Iterable[str]:
        """See FileHistory."""
        try:
            return super().load_history_strings()
        except OSError:
            return []

    def store_string(self, string: str) -> None:
        """See FileHistory."""
        try:
            super().store_string(string)
        except OSError:
            return
