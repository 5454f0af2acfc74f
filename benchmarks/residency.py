"""The choice of a unit by prefix-cache residency, in virtual time: `python -m benchmarks.residency TRACE...`.

Four units serve one model. Their pools together hold a quarter of the distinct blocks of a recorded trace of prompts
with shared prefixes (Mooncake's JSONL), whose times are scaled so that prefill without any cache would take `LOAD` of
the devices. The simulator drives the router's own choice and compares it with others: by turns, the fewest sequences,
session affinity (a hash of the first blocks), and an oracle that sends each request to the unit with most of its prefix
at that instant, whatever its load. Figures: the part of the prompt tokens that came from the prefix cache, and TTFT.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from zlib import crc32

import numpy as np

from benchmarks.report import Report
from loadtest.traces import MOONCAKE_BLOCK, Arrival, read_trace
from loadtest.workload import Body, Sketch
from muxmesh.config.schema import MeshConfig
from muxmesh.models.model_spec import SIM_SPEC
from router.unit_choice import Candidate
from simulator.forecasts import Forecasts, NoisyLengths
from simulator.run import RESIDENCY_DELAY_S, ChooseUnit, by_first_token, simulate

NUM_UNITS = 4
POOL_SHARE = 0.25
"""Of the distinct blocks of the trace: what the pools of all units hold together."""
LOAD = 0.4
"""Decode takes as much of the devices: without any hit they would be busy for about 0.9 of the time."""
LOADS = (LOAD, 0.6)
SLOTS = 32
BUDGET = 2048
BLOCK = 32
STEP_S, TOKEN_S, CONTEXT_S = 0.01, 1 / 8000, 4e-9
"""Steps of about an 8B model on an A100: 8,000 prompt tokens a second in short contexts."""
TAU = 0.6
"""Rank correlation of predicted and true output lengths."""
MIN_OVER_TURNS = 1.5
MIN_OF_ORACLE = 0.8
SALT_BLOCKS = 2
"""Hash ids that stand for a session: the first is the same system prompt in most requests of a trace."""


def by_turns(candidates: Sequence[Candidate], hashes: Sequence[bytes], turn: int) -> int:
    """Round-robin."""
    return turn % len(candidates)


def least_loaded(candidates: Sequence[Candidate], hashes: Sequence[bytes], turn: int) -> int:
    """The fewest sequences, by turns among equals."""
    n = len(candidates)
    return min(range(n), key=lambda index: (candidates[index].num_sequences, (index - turn) % n))


def by_session(candidates: Sequence[Candidate], hashes: Sequence[bytes], turn: int) -> int:
    """A hash of the prompt's first `SALT_BLOCKS` hash ids."""
    blocks = hashes[: SALT_BLOCKS * MOONCAKE_BLOCK // BLOCK]
    return crc32(b"".join(blocks)) % len(candidates) if blocks else turn % len(candidates)


def most_cached(candidates: Sequence[Candidate], hashes: Sequence[bytes], turn: int) -> int:
    """The oracle: most of the prefix, the fewest sequences and turns among equals."""
    n = len(candidates)
    return min(
        range(n),
        key=lambda index: (
            -candidates[index].num_cached_tokens, candidates[index].num_sequences, (index - turn) % n
        ),
    )  # fmt: skip


@dataclass(frozen=True)
class Strategy:
    """``delay_s``: until a change of a prefix cache is known."""

    name: str
    choose: ChooseUnit
    delay_s: float = RESIDENCY_DELAY_S


TURNS, OURS, ORACLE = (
    Strategy("round-robin", by_turns),
    Strategy("ours", by_first_token),
    Strategy("oracle", most_cached, 0.0),
)
STRATEGIES = (TURNS, Strategy("least loaded", least_loaded), Strategy("session affinity", by_session), OURS, ORACLE)


@dataclass(frozen=True)
class Outcome:
    """``cached``: part of all prompt tokens."""

    cached: float
    ttft_s: float
    p99_ttft_s: float
    num_failed: int


def mesh_config(pool_tokens: int) -> MeshConfig:
    """Four units, each with a pool of ``pool_tokens``."""
    shape = SIM_SPEC.kv_shape(BLOCK, "float32")
    model = {
        "name": "m", "engine": "sim", "max_num_seqs": SLOTS, "max_model_len": 1_000_000, "block_size": BLOCK,
        "prefill_token_budget": BUDGET,
        "sim": {"base_s": STEP_S, "per_token_s": TOKEN_S, "per_context_s": CONTEXT_S},
    }  # fmt: skip
    slab = shape.token_block_bytes * 64
    pool = pool_tokens * shape.kv_bytes_per_token // slab * slab
    units = [{"name": f"unit-{index}", "kv_pool": pool, "slab": slab, "models": [model]} for index in range(NUM_UNITS)]
    return MeshConfig.model_validate({"units": units, "router": {"max_waiting_requests": 1_000_000}})


def prefill_s(num_tokens: int) -> float:
    """Seconds of prefill of a prompt without a cache."""
    steps = -(-num_tokens // BUDGET)
    return steps * STEP_S + num_tokens * TOKEN_S + num_tokens * (num_tokens - 1) / 2 * CONTEXT_S


def sketches_of(arrivals: Sequence[Arrival], load: float) -> list[Sketch]:
    """The requests, their times scaled to ``load``."""
    busy_s = sum(prefill_s(one.num_input) for one in arrivals) / NUM_UNITS
    scale = busy_s / load / max(arrivals[-1].at_s, 1e-9)
    return [
        Sketch(
            index=index, at_s=one.at_s * scale, model=None, tenant=None, priority=0,
            body=Body(None, one.num_input, one.num_output, one.hash_ids), max_new_tokens=one.num_output,
            is_forced=True, seed=0,
        )
        for index, one in enumerate(arrivals)
    ]  # fmt: skip


def outcome(arrivals: Sequence[Arrival], strategy: Strategy, load: float) -> Outcome:
    """One run."""
    num_distinct = len({one for arrival in arrivals for one in arrival.hash_ids})
    pool_tokens = round(num_distinct * MOONCAKE_BLOCK * POOL_SHARE / NUM_UNITS)
    forecasts: Forecasts = NoisyLengths(TAU, [one.num_output for one in arrivals], 1)
    result = simulate(
        mesh_config(pool_tokens), {"m": SIM_SPEC}, sketches_of(arrivals, load), forecasts,
        choose_unit=strategy.choose, residency_delay_s=strategy.delay_s,
    )  # fmt: skip
    records = [one for one in result.run.records if one.is_ok]
    ttfts_s = [one.ttft_s for one in records]
    num_cached = sum(one.num_cached or 0 for one in records)
    return Outcome(
        num_cached / sum(one.num_input for one in records),
        mean(ttfts_s),
        float(np.percentile(ttfts_s, 99)),
        len(result.run.records) - len(records),
    )


def compared(bench: Report, trace: str, load: float, outcomes: Mapping[str, Outcome], is_required: bool) -> None:
    """Adds the figures of one trace at one load."""
    for name, one in outcomes.items():
        bench.bar(f"{trace}, load {load:g}, {name}: cached part of prompts", one.cached)
        bench.bar(f"{trace}, load {load:g}, {name}: mean TTFT, s", one.ttft_s)
        bench.bar(f"{trace}, load {load:g}, {name}: p99 TTFT, s", one.p99_ttft_s)
    ours, turns, oracle = (outcomes[strategy.name].cached for strategy in (OURS, TURNS, ORACLE))
    for what, value, least in (
        ("round-robin", ours / turns if turns else float("inf"), MIN_OVER_TURNS),
        ("oracle", ours / oracle if oracle else float("inf"), MIN_OF_ORACLE),
    ):
        name = f"{trace}, load {load:g}: cached tokens, ours over {what}"
        if is_required:
            bench.bar(name, value, f"at least {least:g}", value >= least)
        else:
            bench.bar(name, value)
    bench.figures[f"{trace}, load {load:g}"] = {name: vars(one) for name, one in outcomes.items()}


def main() -> int:
    """Runs all strategies on all traces; 0 if every required figure is reached."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("traces", nargs="+", type=Path, help="Mooncake's JSONL; the first one has to reach the bars")
    parser.add_argument("--requests", type=int, default=2000, help="the first ones of each trace")
    parser.add_argument("--loads", type=float, nargs="+", default=LOADS)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    bench = Report("residency")
    with ProcessPoolExecutor(options.workers) as pool:
        for number, trace in enumerate(options.traces):
            arrivals = read_trace(trace)[: options.requests]
            runs = {
                (load, strategy.name): pool.submit(outcome, arrivals, strategy, load)
                for load in options.loads
                for strategy in STRATEGIES
            }
            for load in options.loads:
                outcomes = {strategy.name: runs[load, strategy.name].result() for strategy in STRATEGIES}
                is_required = number == 0 and load == LOAD
                compared(bench, trace.name.split(".")[0], load, outcomes, is_required)
    return 0 if bench.write() else 1


if __name__ == "__main__":
    sys.exit(main())
