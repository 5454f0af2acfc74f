"""`python -m tests.compose.stream_client ADDRESS MODEL STREAMS TOKENS`: greedy streams at the same time, as a program.

Prints ``running`` when each stream has a token, and at the end a JSON list with an object for each stream: ``tokens``,
``deltas`` (messages with tokens), ``finish``, ``error`` (the class of the error, or empty).
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import asdict, dataclass, field

from muxmesh.client import MeshClient
from muxmesh.errors import MeshError


@dataclass(slots=True)
class Stream:
    """What a client received of one stream."""

    tokens: list[int] = field(default_factory=list)
    deltas: int = 0
    finish: str = ""
    error: str = ""


async def _run(address: str, model: str, num_streams: int, num_tokens: int) -> list[Stream]:
    streams = [Stream() for _ in range(num_streams)]
    begun = [asyncio.Event() for _ in streams]

    async def receive(client: MeshClient, number: int) -> None:
        stream = streams[number]
        prompt = f"Prompt number {number}"
        try:
            async for delta in client.stream(prompt, model=model, max_new_tokens=num_tokens, temperature=0):
                stream.tokens += delta.token_ids
                stream.deltas += bool(delta.token_ids)
                stream.finish = delta.finish.reason if delta.finish else stream.finish
                if stream.tokens:
                    begun[number].set()
        except MeshError as error:
            stream.error = type(error).__name__
        begun[number].set()

    async def announce() -> None:
        await asyncio.gather(*(one.wait() for one in begun))
        print("running", flush=True)

    async with MeshClient(address) as client:
        await asyncio.gather(announce(), *(receive(client, number) for number in range(num_streams)))
    return streams


def main() -> None:
    """Runs the streams of the command line."""
    address, model, num_streams, num_tokens = sys.argv[1:]
    streams = asyncio.run(_run(address, model, int(num_streams), int(num_tokens)))
    print(json.dumps([asdict(stream) for stream in streams]))


if __name__ == "__main__":
    main()
