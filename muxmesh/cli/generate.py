"""`muxmesh generate`: streams the output of one prompt to stdout and prints its speed to stderr."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import sys
from typing import Any

from muxmesh.cli.common import print_json, read_all
from muxmesh.cli.mesh_client import client_of
from muxmesh.cli.streamed_output import StreamedOutput
from muxmesh.cli.terminal_text import harmless
from muxmesh.client import Candidate, Completion, Message, Prompt, RequestOptions
from muxmesh.errors import InvalidRequest


def run(arguments: argparse.Namespace) -> int:
    """Sends the prompt and prints the output; returns the exit code."""
    return asyncio.run(_generate(arguments))


def sampling_options(arguments: argparse.Namespace) -> RequestOptions:
    """Maps the sampling arguments of the command line to options of `MeshClient.stream`."""
    return {
        "model": arguments.model,
        "max_new_tokens": arguments.max_new_tokens,
        "temperature": arguments.temperature,
        "top_k": arguments.top_k,
        "top_p": arguments.top_p,
        "min_p": arguments.min_p,
        "presence_penalty": arguments.presence_penalty,
        "frequency_penalty": arguments.frequency_penalty,
        "repetition_penalty": arguments.repetition_penalty,
        "logit_bias": dict(arguments.logit_bias),
        "allowed_token_ids": arguments.allowed_token_ids,
        "seed": arguments.seed,
        "stop_strings": arguments.stop,
        "cache_salt": arguments.cache_salt,
        "priority": arguments.priority,
        "timeout_s": arguments.timeout,
    }


async def _generate(arguments: argparse.Namespace) -> int:
    text = read_all() if arguments.prompt == "-" else arguments.prompt
    prompt: Prompt = [Message("user", text)] if arguments.chat else text
    for name, count in (("logprobs", arguments.logprobs), ("prompt_logprobs", arguments.prompt_logprobs)):
        if count is not None and not arguments.json:
            raise InvalidRequest(name, "log-probabilities are printed with --json only")
    if arguments.explain and arguments.num_sequences > 1 and not arguments.json:
        raise InvalidRequest("explain", "with several outputs, scheduling is printed with --json only")
    options = sampling_options(arguments) | RequestOptions(
        num_sequences=arguments.num_sequences,
        expected_output_tokens=arguments.expected_output_tokens,
        explain_scheduling=arguments.explain,
        logprobs=arguments.logprobs,
        prompt_logprobs=arguments.prompt_logprobs,
    )
    async with client_of(arguments, arguments.address) as client:
        if arguments.json:
            content = [_content(completion) for completion in await client.generate_many(prompt, **options)]
            print_json(content[0] if arguments.num_sequences <= 1 else content)
        elif arguments.num_sequences > 1:
            for number, completion in enumerate(await client.generate_many(prompt, **options), 1):
                print(f"[{number}] {harmless(completion.text, sys.stdout)}")
        else:
            await StreamedOutput().stream(client, prompt, **options)
    return 0


def _content(completion: Completion) -> dict[str, Any]:
    finish, timings, prompt = completion.finish, completion.timings, completion.prompt
    content: dict[str, Any] = {
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "num_prompt_tokens": prompt.num_tokens,
        "num_cached_tokens": prompt.num_cached_tokens,
        "num_output_tokens": finish.num_output_tokens,
        "finish_reason": finish.reason,
        "stopped_by": finish.stopped_by,
        "seed": prompt.seed,
        "queue_s": timings.queue_s,
        "ttft_s": timings.ttft_s,
        "e2e_s": timings.e2e_s,
        "num_restarts": timings.num_restarts,
    }
    if prompt.scheduling is not None:
        content["scheduling"] = dataclasses.asdict(prompt.scheduling)
    if completion.execution is not None:
        content["execution"] = dataclasses.asdict(completion.execution)
    for name, positions in (("logprobs", completion.logprobs), ("prompt_logprobs", prompt.logprobs)):
        if positions:
            content[name] = [
                {"chosen": _candidate(position.chosen), "top": [_candidate(one) for one in position.top]}
                for position in positions
            ]
    return content


def _candidate(candidate: Candidate) -> dict[str, Any]:
    """As the API of OpenAI has it: bytes are a list of numbers, since JSON has no bytes."""
    content = dataclasses.asdict(candidate)
    return {**content, "token_bytes": list(candidate.token_bytes)}
