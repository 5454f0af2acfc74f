"""`muxmesh chat`: a conversation, from a terminal or from lines of a file.

It keeps the turns, which an error or Ctrl-C leaves as they are; the chat template is the router's.
"""

from __future__ import annotations

import argparse
import asyncio
import sys

from muxmesh.cli.common import read_line
from muxmesh.cli.conversation import Turns, chat_models, converse, obey
from muxmesh.cli.generate import sampling_options
from muxmesh.cli.mesh_client import client_of
from muxmesh.cli.message_lines import ENDS, QUOTES, MessageLines, command_of
from muxmesh.client import MeshClient
from muxmesh.errors import ConfigError, InvalidRequest


def run(arguments: argparse.Namespace) -> int:
    """Holds the conversation until its end; returns the exit code."""
    if sys.stdin.isatty() and (sys.stdout.isatty() or sys.stderr.isatty()):
        from muxmesh.cli.terminal_chat import TerminalChat  # noqa: PLC0415 - only a terminal needs its line editor

        return asyncio.run(TerminalChat(arguments).run())
    return _chat_from_lines(arguments)


def _chat_from_lines(arguments: argparse.Namespace) -> int:
    """Sends each line, or block of lines, of standard input as a message. Raises the first error."""
    lines, turns = MessageLines(), Turns(arguments.system)
    client = client_of(arguments, arguments.address)
    with asyncio.Runner() as runner:
        try:
            options = sampling_options(arguments)
            options["model"] = runner.run(_only_model(client, arguments.model))
            while (line := read_line()) is not None:  # while the loop is not running, so that Ctrl-C interrupts at once
                if not (message := lines.add(line)):
                    continue
                command = command_of(message)
                if command in ENDS:
                    break
                if command is None:
                    runner.run(converse(client, turns, message, options))
                else:
                    obey(command, turns)
        finally:
            runner.run(client.close())
    if lines.is_open:
        raise ConfigError(f"standard input: the message that begins with {QUOTES} has no end")
    return 0


async def _only_model(client: MeshClient, wanted: str | None) -> str:
    names = await chat_models(client, wanted)
    if len(names) > 1:
        raise InvalidRequest("model", f"is needed, because the mesh serves several; one of: {', '.join(names)}")
    return names[0]
