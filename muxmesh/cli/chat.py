"""`muxmesh chat`: a conversation in the terminal. It keeps the turns; the model's chat template is the router's."""

from __future__ import annotations

import argparse
import asyncio

from muxmesh.cli.generate import sampling_options, stream_output
from muxmesh.client import MeshClient, Message


def run(arguments: argparse.Namespace) -> int:
    """Reads turns from stdin until an empty line or the end of input; returns the exit code."""
    messages = [Message("system", arguments.system)] if arguments.system else []
    with asyncio.Runner() as runner:
        client = runner.run(_connect(arguments.address))
        while line := _read_turn():  # while the loop is not running, so that Ctrl-C interrupts it at once
            messages.append(Message("user", line))
            output = runner.run(stream_output(client, messages, **sampling_options(arguments)))
            messages.append(Message("assistant", output))
        runner.run(client.close())
    return 0


async def _connect(address: str) -> MeshClient:
    return MeshClient(address)


def _read_turn() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
