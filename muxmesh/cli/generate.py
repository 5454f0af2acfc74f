"""`muxmesh generate`: one prompt, its answer as it comes, and how fast it came."""

from __future__ import annotations

import argparse
import asyncio
import sys
from typing import Any

from muxmesh.cli.common import print_json
from muxmesh.client.aio import Completion, Delta, MeshClient, Message, Prompt


def run(arguments: argparse.Namespace) -> int:
    """See `muxmesh generate --help`."""
    return asyncio.run(_generate(arguments))


def sampling_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of `MeshClient.stream` that the command line gave."""
    return {
        "model": arguments.model,
        "max_new_tokens": arguments.max_new_tokens,
        "temperature": arguments.temperature,
        "top_k": arguments.top_k,
        "top_p": arguments.top_p,
        "seed": arguments.seed,
        "stop_strings": arguments.stop,
        "priority": arguments.priority,
        "timeout_s": arguments.timeout,
    }


async def stream_answer(client: MeshClient, prompt: Prompt, **options: Any) -> str:
    """Streams one answer to stdout, its speed to stderr; returns the text."""
    parts: list[str] = []
    last: Delta | None = None
    num_prompt_tokens = 0
    async for last in client.stream(prompt, **options):
        num_prompt_tokens = last.num_prompt_tokens or num_prompt_tokens
        parts.append(last.text)
        print(last.text, end="", flush=True)
    print(flush=True)
    if last is not None and last.finish and last.timings:
        timings, num_tokens = last.timings, last.finish.num_output_tokens
        line = f"[{num_prompt_tokens} prompt tokens, {num_tokens} output tokens, TTFT {timings.ttft_s * 1e3:.0f} ms"
        decode_s = timings.e2e_s - timings.ttft_s
        if num_tokens > 1 and decode_s > 0:
            line += f", {(num_tokens - 1) / decode_s:.1f} tokens/s"
        print(f"{line}, finish: {last.finish.reason}]", file=sys.stderr, flush=True)
    return "".join(parts)


async def _generate(arguments: argparse.Namespace) -> int:
    text = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    prompt: Prompt = [Message("user", text)] if arguments.chat else text
    async with MeshClient(arguments.address) as client:
        if arguments.json:
            print_json(_content(await client.generate(prompt, **sampling_options(arguments))))
        else:
            await stream_answer(client, prompt, **sampling_options(arguments))
    return 0


def _content(completion: Completion) -> dict[str, Any]:
    finish, timings = completion.finish, completion.timings
    return {
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "num_prompt_tokens": completion.num_prompt_tokens,
        "num_output_tokens": finish.num_output_tokens,
        "finish_reason": finish.reason,
        "stopped_by": finish.stopped_by,
        "seed": completion.seed,
        "queue_s": timings.queue_s,
        "ttft_s": timings.ttft_s,
        "e2e_s": timings.e2e_s,
        "num_restarts": timings.num_restarts,
    }
