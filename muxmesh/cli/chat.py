"""`muxmesh chat`: a conversation in the terminal."""

from __future__ import annotations

import argparse
import asyncio

from muxmesh.cli.generate import sampling_options, stream_answer
from muxmesh.client.aio import MeshClient, Message


def run(arguments: argparse.Namespace) -> int:
    """See `muxmesh chat --help`."""
    messages = [Message("system", arguments.system)] if arguments.system else []
    with asyncio.Runner() as runner:
        client = runner.run(_connect(arguments.address))
        while line := _ask():  # between runs of the loop, so that Ctrl-C ends it at once
            messages.append(Message("user", line))
            answer = runner.run(stream_answer(client, messages, **sampling_options(arguments)))
            messages.append(Message("assistant", answer))
        runner.run(client.close())
    return 0


async def _connect(address: str) -> MeshClient:
    return MeshClient(address)


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
