"""One vLLM engine in a process of its own, driven step by step over stdin and stdout. Runs in vLLM's environment.

Started by `benchmarks.engine`. The protocol is one JSON object a line, see `serve`. Imports nothing of MuxMesh.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


class VllmEngine:
    """vLLM's engine core in process, without its server."""

    def __init__(self, folder: str, compiled: bool, max_num_seqs: int) -> None:
        from vllm import EngineArgs, LLMEngine  # type: ignore[import-not-found]  # noqa: PLC0415

        args = EngineArgs(
            model=folder,
            dtype="float32",
            enforce_eager=not compiled,
            max_model_len=2048,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=2048,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
        )
        self._engine = LLMEngine.from_engine_args(args)
        self._count = 0

    def _add(self, prompt: list[int], max_tokens: int) -> None:
        from vllm import SamplingParams  # noqa: PLC0415

        self._count += 1
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        self._engine.add_request(str(self._count), {"prompt_token_ids": prompt}, params)

    def prefill(self, prompts: list[list[int]]) -> float:
        """Seconds until each prompt has its first token."""
        started_at_s = time.perf_counter()
        for prompt in prompts:
            self._add(prompt, 1)
        while self._engine.has_unfinished_requests():
            self._engine.step()
        return time.perf_counter() - started_at_s

    def decode(self, prompts: list[list[int]], steps: int) -> list[float]:
        """Seconds of each decode step of all prompts together."""
        for prompt in prompts:
            self._add(prompt, steps + 8)
        started: set[str] = set()
        while len(started) < len(prompts):
            started |= {output.request_id for output in self._engine.step() if output.outputs[0].token_ids}
        seconds = []
        for _ in range(steps):
            started_at_s = time.perf_counter()
            self._engine.step()
            seconds.append(time.perf_counter() - started_at_s)
        while self._engine.has_unfinished_requests():
            self._engine.step()
        return seconds


def serve(make: Any) -> None:
    """Serves {"prefill": prompts} and {"decode": prompts, "steps": n} until stdin ends."""
    responses = os.fdopen(os.dup(1), "w")  # the engine prints to stdout too: that goes to stderr
    os.dup2(2, 1)
    engine = make()
    print(json.dumps({"ready": True}), file=responses, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "prefill" in request:
            response: Any = engine.prefill(request["prefill"])
        else:
            response = engine.decode(request["decode"], request["steps"])
        print(json.dumps(response), file=responses, flush=True)


if __name__ == "__main__":
    folder, mode, max_num_seqs = sys.argv[1:]
    assert Path(folder).is_dir()
    serve(lambda: VllmEngine(folder, mode == "compiled", int(max_num_seqs)))
