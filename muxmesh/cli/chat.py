"""`muxmesh chat`: a conversation in the terminal."""

from __future__ import annotations

import argparse
import asyncio

from muxmesh.cli.generate import sampling_options, stream_answer
from muxmesh.client.aio import MeshClient, Message


def run(arguments: argparse.Namespace) -> int:
    """See `muxmesh chat --help`."""
    return asyncio.run(_chat(arguments))


async def _chat(arguments: argparse.Namespace) -> int:
    messages = [Message("system", arguments.system)] if arguments.system else []
    async with MeshClient(arguments.address) as client:
        while line := await asyncio.to_thread(_ask):
            messages.append(Message("user", line))
            answer = await stream_answer(client, messages, **sampling_options(arguments))
            messages.append(Message("assistant", answer))
    return 0


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
