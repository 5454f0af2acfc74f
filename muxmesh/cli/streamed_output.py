"""One output of a mesh that is printed while it arrives: its text to stdout, its figures to stderr."""

from __future__ import annotations

import dataclasses
import sys
from typing import Unpack

from muxmesh.cli.terminal_text import harmless
from muxmesh.client import Delta, MeshClient, Prompt, PromptFacts, RequestOptions, Scheduling
from muxmesh.durations import duration_text
from muxmesh.errors import RequestAborted, Unavailable
from muxmesh.execution import Execution, PreemptionReason
from muxmesh.types import UNPREDICTED

_SOURCES = {
    "fixed": "fixed by the request",
    "hint": "hint: the client's own estimate",
    "retrieved": "retrieved: outputs of similar prompts",
    "regressed": "regressed: from the prompt",
    "cold": "cold: no output has ended yet",
    "median": "median: of the outputs of the model so far",
    "floor": "floor: predictions rank too badly to be used",
    "failed": "failed: the predictor failed",
    "late": "late: the predictor took too long",
}
"""The explanation of each source of an expected length."""
_REASONS = {
    PreemptionReason.ORDER: "by one that precedes it",
    PreemptionReason.SLO: "by one whose next token was due",
    PreemptionReason.PRIORITY: "by a better class",
    PreemptionReason.FAIRNESS: "by one of a tenant that had less service",
    PreemptionReason.OVERDUE: "by an overdue request",
    PreemptionReason.KV_GROWTH: "for memory of a growing sequence",
    PreemptionReason.KV_ADMISSION: "for memory of a waiting request",
    PreemptionReason.KV_QUOTA: "for memory of another model",
    PreemptionReason.KV_FULL: "as it lacked memory itself",
}
_WAITS = ("decode slot", "KV memory", "order", "worker", "device")
"""Names of the fields of `muxmesh.types.Waits`."""
_MIN_WAIT_S = 0.001
"""Shorter waits are not shown."""


class StreamedOutput:
    """Prints one output. ``text`` is what has been printed so far, and stays if the output is cut off."""

    def __init__(self) -> None:
        self.text = ""
        self._prompt: PromptFacts | None = None
        self._last: Delta | None = None

    async def stream(self, client: MeshClient, prompt: Prompt, **options: Unpack[RequestOptions]) -> None:
        """Sends the request and prints the output.

        Raises RequestAborted if the router is lost after the output has begun, and what `MeshClient.stream` raises.
        """
        try:
            async for delta in client.stream(prompt, **options):
                self._print(delta)
        except Unavailable as error:
            if self._prompt is None:
                raise
            raise RequestAborted(
                f"the router was lost while it streamed the output: {error}; send the request again"
            ) from error
        finally:
            if self._prompt is not None:
                print(flush=True)
        self._print_figures()

    def _print(self, delta: Delta) -> None:
        self._last, self._prompt = delta, self._prompt or delta.prompt
        self.text += delta.text
        print(harmless(delta.text, sys.stdout), end="", flush=True)

    def _print_figures(self) -> None:
        last, prompt = self._last, self._prompt
        if last is None or prompt is None or last.finish is None or last.timings is None:
            return
        timings, num_tokens = last.timings, last.finish.num_output_tokens
        line = f"[{prompt.num_tokens} prompt tokens ({prompt.num_cached_tokens} cached), {num_tokens} output tokens"
        line += f", TTFT {timings.ttft_s * 1e3:.0f} ms"
        decode_s = timings.e2e_s - timings.ttft_s
        if num_tokens > 1 and decode_s > 0:
            line += f", {(num_tokens - 1) / decode_s:.1f} tokens/s"
        print(f"{line}, finish: {last.finish.reason}]", file=sys.stderr, flush=True)
        if prompt.scheduling is not None:
            print(_explanation(prompt.scheduling), file=sys.stderr, flush=True)
        if last.execution is not None:
            print(_execution(last.execution), file=sys.stderr, flush=True)


def _explanation(info: Scheduling) -> str:
    waits = ", ".join(
        f"{name} {duration_text(seconds)}"
        for name, seconds in zip(_WAITS, dataclasses.astuple(info.waited_for), strict=True)
        if seconds >= _MIN_WAIT_S
    )
    origin = _SOURCES.get(info.source, info.source)
    work = f"{duration_text(info.decode_s)} of decode"
    if info.source in UNPREDICTED:
        work += ", the same for every such request of the model"
    else:
        work = f"{duration_text(info.prefill_s)} of prefill, {work}"
    unit = f"\nchosen unit {info.unit_reason}" if info.unit_reason else ""
    return (
        f"[expected output: {info.p50_output_tokens:.0f} tokens, p90 {info.p90_output_tokens:.0f} ({origin}); "
        f"work: {work}\n"
        f"waited {duration_text(info.waited_s)} for admission {info.decision}, which overtook {info.num_overtaken} "
        f"earlier requests; waited for: {waits or 'nothing'}\n"
        f"{info.reason}{unit}]"
    )


def _execution(info: Execution) -> str:
    preemptions = ", ".join(
        f"{info.preemptions[one]} {text}" for one, text in _REASONS.items() if one in info.preemptions
    )
    seconds = {"in the batch": info.batched_s, "paused": info.paused_s, "swapped": info.swapped_s,
               "computed again": info.recomputed_s}  # fmt: skip
    times = ", ".join(f"{name} {duration_text(s)}" for name, s in seconds.items() if s >= _MIN_WAIT_S)
    overdue = ", overdue" if info.is_overdue else ""
    return (
        f"[pre-empted: {preemptions or 'never'}; length predicted again: {info.num_repredictions} times\n"
        f"{times or 'decoded at once'}{overdue}]"
    )
