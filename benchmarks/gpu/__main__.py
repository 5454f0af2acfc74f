"""`python -m benchmarks.gpu`: speed of the engine on a GPU against what the card can do, as JSON after each part.

Figures are medians of wall-clock times that include the host. Models have random weights and the sizes of real ones.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu.measured import (
    Figures,
    decode_table,
    engine_table,
    failed_runs,
    prefill_table,
    speedup,
    three_models_table,
)
from benchmarks.gpu.mps_daemon import mps_client, mps_daemon
from benchmarks.gpu.peer import Peer, PeerError
from benchmarks.gpu.random_model import BILLION
from benchmarks.gpu_check.check import Findings
from benchmarks.gpu_check.checks.meshes import hand_off
from benchmarks.report import OUT
from muxmesh.errors import MeshError

DTYPE = "bfloat16"
BATCHES, CONTEXTS, PROMPTS = (1, 4, 16, 64), (512, 2048), (512, 2048, 8192)
RUN_STEPS = 16
"""Steps of a run of the whole engine: the default of `continuous_decode_steps`."""
LOAD: dict[str, Any] = {
    "model": "billion", "dtype": DTYPE, "pool_tokens": 64 * 2304, "max_num_seqs": 64, "step_tokens": 8192,
    "max_len": 8448, "max_steps": RUN_STEPS,
}  # fmt: skip
SMALL_LOAD: dict[str, Any] = {
    "model": "half billion", "dtype": DTYPE, "pool_tokens": 16_384, "max_num_seqs": 16, "step_tokens": 1024,
    "max_len": 2048, "max_steps": 4,
}  # fmt: skip
DECODING: dict[str, Any] = {"prompt": 0, "batch": 16, "context": 512, "num_steps": 4}
PREFILLING: dict[str, Any] = {"prompt": 1024, "batch": 0, "context": 0, "num_steps": 1}
NUM_MODELS = 3
SHARES = ((100, 100), (40, 30))
"""Percentages of the SMs of each prefill and each decode worker."""


def ceilings(figures: Figures, is_quick: bool) -> None:
    """The card's own speed: a copy, counting bytes read and written, and a bf16 product."""
    with Peer("torch") as peer:
        figures["device"] = peer.ask("device_name")
        figures["ceilings"] = peer.ask("ceilings", copied_bytes=(1 if is_quick else 4) << 30, size=8192)


def one_model(figures: Figures, is_quick: bool) -> None:
    """Decode and prefill of the model of a billion parameters, with graphs and without."""
    figures["decode"], figures["prefill"], figures["whole engine"] = [], [], []
    with Peer("engine") as peer:
        for with_graphs in (True,) if is_quick else (True, False):
            loaded = peer.ask("load", timeout_s=90, graphs=with_graphs, **LOAD)
            figures[f"load, graphs {with_graphs}"] = loaded
            for batch in BATCHES:
                for context in CONTEXTS[:1] if is_quick or not with_graphs else CONTEXTS:
                    for num_steps in (1, 4) if with_graphs else (1,):
                        case: dict[str, Any] = {"batch": batch, "context": context, "num_steps": num_steps}
                        found = peer.ask("decode", count=10 if is_quick else 25, **case)
                        figures["decode"].append({**case, "graphs": with_graphs, "ms": found["ms"]})
            for batch in BATCHES if with_graphs else ():
                for max_steps in (1, RUN_STEPS):
                    serving: dict[str, Any] = {"batch": batch, "max_steps": max_steps}
                    found = peer.ask("serve", prompt_tokens=512, num_tokens=128 if is_quick else 256, **serving)
                    figures["whole engine"].append({**serving, **found})
            for num_tokens in PROMPTS if with_graphs else ():
                found = peer.ask("prefill", num_tokens=num_tokens, count=3 if is_quick else 8)
                figures["prefill"].append({"num_tokens": num_tokens, "ms": found["ms"]})


def three_models(figures: Figures, is_quick: bool) -> None:
    """Three models, each with a prefill and a decode worker: all at once under MPS, against one after another."""
    asyncio.run(_three_models(figures, 1.0 if is_quick else 3.0, SHARES[-1:] if is_quick else SHARES))


async def _three_models(figures: Figures, seconds: float, all_shares: tuple[tuple[int, int], ...]) -> None:
    works: list[dict[str, Any]] = [PREFILLING, DECODING] * NUM_MODELS
    with contextlib.ExitStack() as stack:
        alone = _loaded([stack.enter_context(Peer("engine")) for _ in works[:2]])
        pair = [peer.ask("work_until", seconds=seconds, **work) for peer, work in zip(alone, works, strict=False)]
    done = {"alone": pair}
    rates = [one["tokens_per_s"] for one in pair] * NUM_MODELS  # the models have the same sizes
    figures["three models"] = {"tokens_per_s_alone": rates, "under MPS": []}
    for shares in all_shares:
        async with mps_daemon() as control:
            with contextlib.ExitStack() as stack:
                started = [stack.enter_context(mps_client(control, 100, "engine")) for _ in works]
                for index, peer in enumerate(started):  # a percentage of MPS would make products wrong
                    peer.ask("green", shares=shares * NUM_MODELS, index=index)
                peers = _loaded(started)
                for peer, work in zip(peers, works, strict=True):
                    peer.tell("work_until", seconds=seconds, **work)
                results = [peer.reply() for peer in peers]
        done[f"shares {shares}"] = results
        together = [one["tokens_per_s"] for one in results]
        result = {"shares": shares, "tokens_per_s": together, "speed-up": speedup(together, rates)}
        figures["three models"]["under MPS"].append(result)
    failed = figures["three models"]["failed runs"] = failed_runs(done)
    assert not failed, "; ".join(failed)


def _loaded(peers: list[Peer]) -> list[Peer]:
    for peer in peers:
        peer.tell("load", **SMALL_LOAD)
    for peer in peers:
        peer.reply(90)
    return peers


def handed_off(figures: Figures, is_quick: bool) -> None:
    """The hand-off through a whole mesh, as a client sees it."""
    findings = Findings()
    hand_off(findings, is_dry_run=False)
    figures["hand-off"] = findings.figures


PARTS: dict[str, Callable[[Figures, bool], None]] = {
    "ceilings": ceilings,
    "one-model": one_model,
    "three-models": three_models,
    "hand-off": handed_off,
}


def main() -> int:
    """Measures part by part. Returns 1 if a part failed; the others' figures are written all the same."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--output", type=Path, default=OUT, help="folder for gpu.json")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas; default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="fewer cases and repetitions")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    path, figures, failed = arguments.output / "gpu.json", Figures(), []
    for name in arguments.only.split(","):
        started_at_s = time.monotonic()
        try:
            PARTS[name](figures, arguments.quick)
        except (PeerError, MeshError, AssertionError, OSError) as error:
            failed.append(name)
            figures[f"{name} failed"] = f"{type(error).__name__}: {error}"
            print(f"{name} failed: {error}", flush=True)
        figures[f"{name}_s"] = round(time.monotonic() - started_at_s, 1)
        path.write_text(json.dumps(figures, indent=1, default=str) + "\n")
    vocabulary = BILLION.vocab_size * BILLION.hidden_size
    tables = (
        decode_table(figures),
        engine_table(figures),
        prefill_table(figures, vocabulary),
        three_models_table(figures),
    )
    print("\n\n".join(filter(None, tables)))
    print(f"\nhand-off: {figures.get('hand-off')}\n{path} written")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
