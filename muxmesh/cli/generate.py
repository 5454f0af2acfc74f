"""`muxmesh generate`: streams the output of one prompt to stdout and prints its speed to stderr."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import sys
from typing import Any

from muxmesh.cli.common import print_json
from muxmesh.client import Candidate, Completion, Delta, MeshClient, Message, Prompt, PromptFacts, Scheduling
from muxmesh.durations import duration_text
from muxmesh.errors import InvalidRequest, RequestAborted, Unavailable

_SOURCES = {
    "fixed": ("fixed by the request", False),
    "hint": ("hint: the client's own estimate", False),
    "retrieved": ("retrieved: outputs of similar prompts", False),
    "regressed": ("regressed: from the prompt", False),
    "cold": ("cold: no output has ended yet", True),
    "typical": ("typical: the outputs of the model so far", True),
    "floor": ("floor: predictions rank too badly to be used", True),
    "failed": ("failed: the predictor failed", True),
    "late": ("late: the predictor took too long", True),
}
"""Of each source of an expected length: its explanation, and whether all requests with it have equal work."""
_WAITS = ("decode slot", "KV memory", "order", "worker", "device")
"""Names of the fields of `muxmesh.types.Waits`."""
_MIN_WAIT_S = 0.001
"""Shorter waits are not shown."""


def run(arguments: argparse.Namespace) -> int:
    """Sends the prompt and prints the output; returns the exit code."""
    return asyncio.run(_generate(arguments))


def sampling_options(arguments: argparse.Namespace) -> dict[str, Any]:
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


async def stream_output(client: MeshClient, prompt: Prompt, **options: Any) -> str:
    """Streams one output to stdout and prints its speed to stderr; returns the text.

    Raises RequestAborted if the router is lost after the output has begun, and what `MeshClient.stream` raises.
    """
    parts: list[str] = []
    last: Delta | None = None
    facts: PromptFacts | None = None
    try:
        async for last in client.stream(prompt, **options):
            facts = facts or last.prompt
            parts.append(last.text)
            print(last.text, end="", flush=True)
    except Unavailable as error:
        if facts is None:
            raise
        raise RequestAborted(
            f"the router was lost while it streamed the output; send the request again ({error})"
        ) from error
    finally:
        if facts is not None:
            print(flush=True)
    if last is not None and facts and last.finish and last.timings:
        timings, num_tokens = last.timings, last.finish.num_output_tokens
        line = f"[{facts.num_tokens} prompt tokens ({facts.num_cached_tokens} cached), {num_tokens} output tokens"
        line += f", TTFT {timings.ttft_s * 1e3:.0f} ms"
        decode_s = timings.e2e_s - timings.ttft_s
        if num_tokens > 1 and decode_s > 0:
            line += f", {(num_tokens - 1) / decode_s:.1f} tokens/s"
        print(f"{line}, finish: {last.finish.reason}]", file=sys.stderr, flush=True)
        if facts.scheduling is not None:
            print(_explanation(facts.scheduling), file=sys.stderr, flush=True)
    return "".join(parts)


def _explanation(info: Scheduling) -> str:
    waits = ", ".join(
        f"{name} {duration_text(seconds)}"
        for name, seconds in zip(_WAITS, dataclasses.astuple(info.waited_for), strict=True)
        if seconds >= _MIN_WAIT_S
    )
    origin, is_alike = _SOURCES.get(info.source, (info.source, False))
    work = f"{duration_text(info.decode_s)} of decode"
    if is_alike:
        work += ", the same for every such request of the model"
    else:
        work = f"{duration_text(info.prefill_s)} of prefill, {work}"
    return (
        f"[expected output: {info.p50_output_tokens:.0f} tokens, p90 {info.p90_output_tokens:.0f} ({origin}); "
        f"work: {work}\n"
        f"waited {duration_text(info.waited_s)} for admission {info.decision}, which overtook {info.num_overtaken} "
        f"earlier requests; waited for: {waits or 'nothing'}\n"
        f"{info.reason}]"
    )


async def _generate(arguments: argparse.Namespace) -> int:
    text = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    prompt: Prompt = [Message("user", text)] if arguments.chat else text
    if not arguments.json and (arguments.logprobs is not None or arguments.prompt_logprobs is not None):
        raise InvalidRequest("logprobs", "log-probabilities are printed with --json only")
    if arguments.explain and arguments.num_sequences > 1 and not arguments.json:
        raise InvalidRequest("explain", "with several outputs, scheduling is printed with --json only")
    request = {
        "num_sequences": arguments.num_sequences,
        "expected_output_tokens": arguments.expected_output_tokens,
        "explain_scheduling": arguments.explain,
    }
    logprobs = {"logprobs": arguments.logprobs, "prompt_logprobs": arguments.prompt_logprobs}
    async with MeshClient(arguments.address) as client:
        if arguments.json:
            completions = await client.generate_many(prompt, **sampling_options(arguments), **request, **logprobs)
            content = [_content(completion) for completion in completions]
            print_json(content[0] if arguments.num_sequences <= 1 else content)
        elif arguments.num_sequences > 1:
            completions = await client.generate_many(prompt, **sampling_options(arguments), **request)
            for number, completion in enumerate(completions, 1):
                print(f"[{number}] {completion.text}")
        else:
            await stream_output(client, prompt, **sampling_options(arguments), **request)
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
