"""The swap tier: size, speed, and the effect of one swap on the likelihood of an output.

`python -m benchmarks.swap JSONL`: lines of {"prompt", "output"}, such as GSM8K's. The default model scores each output
after its prompt (negative log-likelihood, nats per token): undisturbed, and with all KV so far swapped out and in, raw
and int8, after the prompt and in the middle of the output. Then a mesh whose pool is too small serves the same requests
with and without a swap tier.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.mesh_process import up
from benchmarks.report import Report
from kvstore.swap_space import SwapSpace
from muxmesh.cli.common import cache_dir
from muxmesh.client import Message
from muxmesh.config.model_config import ModelConfig
from muxmesh.config.schema import DEFAULT_MODEL
from muxmesh.device.kv_codec import decode, encode, encoded_bytes
from muxmesh.device.kv_view import KvView
from muxmesh.device.swap_region import SwapCopy
from muxmesh.engine.native.cpu.forward import open_cpu_forward
from muxmesh.engine.native.cpu.thread_team import Team
from muxmesh.engine.native.logits_runner import LogitsRunner
from muxmesh.engine.step import Chunk, PromptScoring, Step
from muxmesh.models.model_spec import read_model_spec
from muxmesh.models.prepared_model import prepare_model
from muxmesh.models.tokenizer import load_text_model
from muxmesh.types import SWAP_PAGE_BYTES, KvFormat, blocks_for

NUM_OUTPUTS = 100
MOST_NLL_CHANGE = 0.005
LEAST_RATIO = 3.7
FORMATS: tuple[KvFormat, ...] = ("raw", "int8")
_MIB = 1 << 20
_SLAB_BYTES = 16 * _MIB
_SWAP_BYTES = 256 * _MIB
_MAX_TOKENS = 2048
STEP_TOKENS = 128


class Scorer:
    """The engine's runner over a pool, and a swap region."""

    def __init__(self, folder: Path, image: Path) -> None:
        spec = read_model_spec(folder)
        self.shape = spec.kv_shape(16, "float32")
        self._view = KvView(self.shape, _SLAB_BYTES, np.zeros(512 * _MIB // 4, dtype=np.float32))
        self._runner = LogitsRunner(self._view, lambda pool: open_cpu_forward(spec, image, pool, _MAX_TOKENS, Team(2)))
        self._runner.load()
        self._rng = random.Random(1)
        self._region = np.zeros(_SWAP_BYTES, dtype=np.uint8)
        self.copied: dict[tuple[KvFormat, str], list[float]] = {}
        self.computed_s_per_token: list[float] = []

    def nll(self, prompt: list[int], output: list[int], swap_after: int | None, kv_format: KvFormat) -> list[float]:
        """Nats of each token of ``output``. All KV is swapped after ``swap_after`` of its tokens; None: never."""
        known = [*prompt, *output]
        blocks = self._some_blocks(len(known))
        turn = len(prompt) - 1 + (swap_after or 0)
        self._compute(known[: len(prompt) - 1], 0, blocks, [])
        scored: list[float] = []
        self._compute(known[len(prompt) - 1 : turn], len(prompt) - 1, blocks, scored, output[: swap_after or 0])
        if swap_after is not None:
            blocks = self._swapped(blocks, turn, len(known), kv_format)
        self._compute(known[turn:-1], turn, blocks, scored, output[swap_after or 0 :])
        return scored

    def prefault(self) -> None:
        """Writes to all pages of the swap region, so that no later copy waits for the kernel."""
        self._region.fill(1)

    def times(self, num_tokens: int) -> dict[str, float]:
        """Seconds to compute ``num_tokens`` tokens, and to swap them out and in, raw and int8."""
        blocks = self._some_blocks(num_tokens)
        started_s = time.perf_counter()
        self._compute([3 + number % 1000 for number in range(num_tokens)], 0, blocks, [])
        seconds = {"prefill": time.perf_counter() - started_s}
        for kv_format in FORMATS:
            blocks = self._swapped(blocks, num_tokens, num_tokens, kv_format)
            seconds |= {f"{kv_format} {way}": self.copied[kv_format, way][-1] * num_tokens for way in ("out", "in")}
        return seconds

    def _some_blocks(self, num_tokens: int) -> list[int]:
        most = self._view.pool.nbytes // _SLAB_BYTES * self._view.blocks_per_slab
        return self._rng.sample(range(most), blocks_for(num_tokens, self.shape.block_size))

    def _compute(
        self, tokens: list[int], start: int, blocks: list[int], scored: list[float], following: list[int] | None = None
    ) -> None:
        for first in range(0, len(tokens), STEP_TOKENS):
            part = tuple(tokens[first : first + STEP_TOKENS])
            score = PromptScoring(tuple(following[first : first + len(part)]), 0) if following else None
            started_s = time.perf_counter()
            outcome = self._runner.run(Step((Chunk(1, start + first, part, tuple(blocks), None, score),)))
            if score:
                scored += [-entry.chosen.logprob for entry in outcome.prompt_logprobs[1]]
            elif len(part) == STEP_TOKENS:
                self.computed_s_per_token.append((time.perf_counter() - started_s) / len(part))

    def _swapped(self, blocks: list[int], num_computed: int, num_tokens: int, kv_format: KvFormat) -> list[int]:
        """Swaps out to scattered pages and in to other blocks, which it returns. The old blocks are filled with NaN."""
        num_bytes = encoded_bytes(self.shape, num_computed, kv_format)
        space = SwapSpace(_SWAP_BYTES)
        pages = self._rng.sample(range(space.num_pages), blocks_for(num_bytes, SWAP_PAGE_BYTES))
        started_s = time.perf_counter()
        encode(self._view, blocks, num_computed, kv_format, SwapCopy(self._region, pages))
        self._count(kv_format, "out", num_computed, started_s)
        size = self.shape.token_block_bytes // 4
        for offset in self._view.block_offsets(blocks):
            self._view.pool[offset : offset + size] = np.nan
        elsewhere = self._some_blocks(num_tokens)
        started_s = time.perf_counter()
        decode(self._view, elsewhere, num_computed, kv_format, SwapCopy(self._region, pages))
        self._count(kv_format, "in", num_computed, started_s)
        return elsewhere

    def _count(self, kv_format: KvFormat, way: str, num_tokens: int, started_s: float) -> None:
        self.copied.setdefault((kv_format, way), []).append((time.perf_counter() - started_s) / num_tokens)


def read_pairs(path: Path) -> Iterator[tuple[str, str]]:
    """Prompts and outputs of a jsonl file, plain or gzipped."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        for line in lines:
            item = json.loads(line)
            yield item["prompt"], item["output"]


def quality(report: Report, data: Path) -> None:
    """Measures the change of the NLL, the sizes and the speeds."""
    with TemporaryDirectory() as state_dir:
        prepared = prepare_model(
            ModelConfig(name=DEFAULT_MODEL), "panels", Path(state_dir), cache_dir(), lambda what, done, total: None
        )
    assert prepared.folder is not None
    assert prepared.image is not None
    text_model, scorer = load_text_model(prepared.folder), Scorer(prepared.folder, prepared.image)
    totals: dict[str, list[float]] = {}
    raw_bytes = int8_bytes = 0
    differing = 0
    for _, (prompt, output) in zip(range(NUM_OUTPUTS), read_pairs(data), strict=False):
        asked = text_model.encode(text_model.render_chat([{"role": "user", "content": prompt}]), False)
        scored = text_model.encode(output, False)
        undisturbed = scorer.nll(asked, scored, None, "raw")
        totals.setdefault("undisturbed", []).append(statistics.fmean(undisturbed))
        for where, swap_after in (("after the prompt", 0), ("in the middle", len(scored) // 2)):
            differing += scorer.nll(asked, scored, swap_after, "raw") != undisturbed
            changed = scorer.nll(asked, scored, swap_after, "int8")
            totals.setdefault(f"int8 {where}", []).append(statistics.fmean(changed))
        raw_bytes += encoded_bytes(scorer.shape, len(asked) + len(scored), "raw")
        int8_bytes += encoded_bytes(scorer.shape, len(asked) + len(scored), "int8")
    means = {name: statistics.fmean(values) for name, values in totals.items()}
    per_token = {" ".join(key): statistics.median(values) for key, values in scorer.copied.items()}
    recomputed = statistics.median(scorer.computed_s_per_token)
    report.figures |= {
        "num_answers": len(totals["undisturbed"]),
        "mean_nll_nats": means,
        "largest_change_of_one_answer": {
            name: max(abs(a / b - 1) for a, b in zip(values, totals["undisturbed"], strict=True))
            for name, values in totals.items()
        },
        "copy_s_per_1000_tokens": {name: 1000 * value for name, value in per_token.items()},
        "recompute_s_per_1000_tokens": 1000 * recomputed,
    }
    report.bar("raw: scores that differ from the undisturbed ones", differing, "0", differing == 0)
    for name, mean in means.items():
        if name != "undisturbed":
            change = mean / means["undisturbed"] - 1
            report.bar(f"{name}: change of the mean NLL", change, "at most 0.005", abs(change) <= MOST_NLL_CHANGE)
    ratio = raw_bytes / int8_bytes
    report.bar("int8: times smaller than f32", ratio, f"at least {LEAST_RATIO}", ratio >= LEAST_RATIO)
    for kv_format in FORMATS:
        gain = recomputed / (per_token[f"{kv_format} out"] + per_token[f"{kv_format} in"])
        report.bar(f"{kv_format}: out and in, times faster than computing again", gain, "more than 1", gain > 1)


async def pressure(swap: str, kv_format: KvFormat) -> dict[str, Any]:
    """Eight long outputs in a pool with memory for three of them."""
    config = {
        "units": [{
            "kv_pool": "80MiB", "slab": "8MiB", "kv_swap": swap,
            "models": [{"name": DEFAULT_MODEL, "kv_swap_format": kv_format}],
        }]
    }  # fmt: skip
    with TemporaryDirectory() as folder:
        path = Path(folder, "mesh.yaml")
        path.write_text(json.dumps(config))
        async with up("-c", str(path)) as mesh:
            started_s = time.monotonic()
            completions = await asyncio.gather(
                *(
                    mesh.client.generate(
                        [Message("user", f"Tell a long story about the number {seed}.")],
                        max_new_tokens=500, ignore_eos=True, seed=seed, temperature=0.7, bypass_prefix_cache=True,
                    )
                    for seed in range(8)
                )
            )  # fmt: skip
            seconds = time.monotonic() - started_s
            workers = (await mesh.client.status()).units[0].workers
            return {
                "s": seconds,
                "num_restarts": sum(one.timings.num_restarts for one in completions),
                "swapped_mib": sum(worker.swap_out_bytes for worker in workers) / _MIB,
                "swap_s": sum(worker.swap_s for worker in workers),
                "tokens": [list(one.token_ids) for one in completions],
            }


def main(data: Path) -> int:
    """Measures; exit code 1 if a bar is missed."""
    report = Report("swap")
    quality(report, data)
    runs = {"none": asyncio.run(pressure("0", "raw"))}
    runs |= {kv_format: asyncio.run(pressure("1GiB", kv_format)) for kv_format in FORMATS}
    same = runs["raw"].pop("tokens") == runs["none"].pop("tokens")
    del runs["int8"]["tokens"]
    report.figures["eight_answers_in_a_pool_for_three"] = runs
    report.bar("a full pool: answers of the raw run equal those without swap", same, "all", same)
    for name in FORMATS:
        gain = runs["none"]["s"] / runs[name]["s"]
        report.bar(f"a full pool: seconds without swap / with {name}", gain)
    return 0 if report.write() else 1


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(
            "usage: python -m benchmarks.swap DATA, a jsonl file of {prompt, output} (make bench-swap DATA=...)"
        )
    sys.exit(main(Path(sys.argv[1])))
