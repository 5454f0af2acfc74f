"""A conversation on a terminal: keys, commands, and errors that leave it standing."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys

from muxmesh.cli.conversation import Turns, chat_models, converse, obey
from muxmesh.cli.generate import sampling_options
from muxmesh.cli.line_editor import LineCleared, LineEditor, open_history
from muxmesh.cli.mesh_client import client_of
from muxmesh.cli.message_lines import ENDS, MessageLines, command_of
from muxmesh.cli.terminal_text import harmless
from muxmesh.client import MeshClient, RequestOptions
from muxmesh.errors import ConfigError, InvalidRequest, MeshError
from muxmesh.quoting import named


class TerminalChat:
    """A conversation on a terminal. Only the user ends it."""

    def __init__(self, arguments: argparse.Namespace, editor: LineEditor | None = None) -> None:
        """``editor``: None reads from the terminal, with the history of earlier chats."""
        self._arguments = arguments
        self._editor = editor or LineEditor(open_history(arguments.history))
        self._lines = MessageLines()
        self._turns = Turns(arguments.system)
        self._generation: asyncio.Task[None] | None = None

    async def run(self) -> int:
        """Returns the exit code. Raises MeshError if the conversation cannot begin."""
        async with client_of(self._arguments, self._arguments.address) as client:
            options = sampling_options(self._arguments)
            options["model"] = await self._model(client)
            print(f"{options['model']}: /help shows the keys and commands, /bye ends", file=sys.stderr, flush=True)
            asyncio.get_running_loop().add_signal_handler(signal.SIGINT, self._interrupt)
            while (message := await self._read()) is not None:
                command = command_of(message)
                if command in ENDS:
                    break
                if command is None:
                    await self._send(client, message, options)
                else:
                    self._obey(command)
        return 0

    async def _model(self, client: MeshClient) -> str:
        names = await chat_models(client, self._arguments.model)
        if len(names) > 1:
            print("\n".join(f"{number}  {name}" for number, name in enumerate(names, 1)), file=sys.stderr, flush=True)
        while len(names) > 1:
            try:
                chosen = await self._editor.read("model, by number or name: ")
            except LineCleared:
                chosen = None
            if chosen is None:
                raise KeyboardInterrupt
            if found := [name for number, name in enumerate(names, 1) if chosen.strip() in (name, str(number))]:
                names = found
            else:
                _note(f"{named(chosen)} is not one of them")
        return names[0]

    async def _read(self) -> str | None:
        """The next message, which is not empty; None at the end of input."""
        while True:
            try:
                line = await self._editor.read("... " if self._lines.is_open else "> ")
            except LineCleared as cleared:
                if cleared.was_empty and not self._lines.is_open:
                    _note("/bye or Ctrl-D ends the chat")
                self._lines.discard()
                continue
            if line is None:
                return None
            if message := self._lines.add(line):
                return message

    async def _send(self, client: MeshClient, message: str, options: RequestOptions) -> None:
        self._generation = asyncio.create_task(converse(client, self._turns, message, options))
        try:
            await self._generation
        except asyncio.CancelledError:
            _note("stopped")
        except MeshError as error:
            print(harmless(f"muxmesh: {error}", sys.stderr), file=sys.stderr, flush=True)
            if isinstance(error, InvalidRequest) and not self._turns.is_empty:
                _note("the conversation is kept without this message; /clear begins a new one")
            else:
                _note("the conversation is kept; arrow-up brings the message back")
        finally:
            self._generation = None

    def _obey(self, command: str) -> None:
        try:
            _note(obey(command, self._turns))
        except ConfigError as error:
            print(f"muxmesh: {error}", file=sys.stderr, flush=True)

    def _interrupt(self) -> None:
        """Ctrl-C while no line is edited: stops the output, if there is one."""
        if self._generation is not None:
            self._generation.cancel()


def _note(text: str) -> None:
    print(text if "\n" in text else f"({text})", file=sys.stderr, flush=True)
