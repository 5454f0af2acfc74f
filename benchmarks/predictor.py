"""The length predictor on the outputs of public files and on those of the served model; each output is predicted first.

`python -m benchmarks.predictor FOLDER [--own FILE.jsonl]`: FOLDER has the public files, FILE is written by
`benchmarks.own_outputs`.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import itertools
import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.lengths_data import ALPACA_MODELS, alpaca_items, stream_items
from benchmarks.report import Report
from muxmesh.cli.predictor import read_items
from muxmesh.clock import SystemClock
from muxmesh.predictor.checked_predictor import CheckedPredictor
from muxmesh.predictor.evaluate import Item, Outcome, replay, report, tau
from muxmesh.predictor.length_predictor import LengthPredictor, fit_now

SEEDS = (0, 1, 2)
_KNOWN_MODELS = 4


def main() -> int:
    """Measures; exit code 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--own", type=Path, help="outputs of the served model")
    parser.add_argument("--each", type=int, default=1100, help="prompts taken from each task for the mixed stream")
    arguments = parser.parse_args()
    bench = Report("predictor")
    _alpaca(bench, arguments.folder)
    streams = _mixed(bench, arguments.folder, arguments.each)
    _known_prompts(bench, arguments.folder)
    _latency(bench, streams)
    if arguments.own:
        _own(bench, arguments.own)
    return 0 if bench.write() else 1


def _alpaca(bench: Report, folder: Path) -> None:
    taus, better = [], []
    for seed in SEEDS:
        found = report(replay(alpaca_items(folder, seed), SystemClock()))
        taus.append(statistics.fmean(one["tau"] for one in found["models"].values()))
        better += [one["mae"] / one["mae_median"] for one in found["models"].values()]
        bench.figures[f"alpaca seed {seed}"] = found
    value = statistics.median(taus)
    bench.bar(
        "AlpacaEval, mean tau of the models", value, "at least 0.22", value >= 0.22, "at least 0.32", value >= 0.32
    )
    bench.bar("AlpacaEval, worst MAE / that of the model's median", max(better), "below 1", max(better) < 1)


def _mixed(bench: Report, folder: Path, each: int) -> list[list[Outcome]]:
    taus, within, errors, tasks = [], [], [], []
    streams: list[list[Outcome]] = []
    for seed in SEEDS:
        streams.append(replay(stream_items(folder, each, seed), SystemClock()))
        found = report(streams[-1])
        bench.figures[f"mixed seed {seed}"] = found
        taus.append(found["pooled"]["tau"])
        errors.append(found["pooled"]["mae"] / found["pooled"]["mae_median"])
        within.append(found["p90_windows"]["within_band"])
        tasks += [one["mae"] / one["mae_constant"] for one in found["tasks"].values()]
        for name, one in found["tasks"].items():
            of_all, of_own = one["mae"] / one["mae_constant"], one["mae"] / one["mae_median"]
            print(
                f"mixed, seed {seed}, {name}: tau {one['tau']:.3f}, "
                f"MAE over that of the stream's median {of_all:.2f}, over that of its own {of_own:.2f}"
            )
    value = statistics.median(taus)
    bench.bar("mixed stream, tau", value, "at least 0.50", value >= 0.50, "at least 0.62", value >= 0.62)
    bench.bar("mixed stream, MAE / that of the median", max(errors), "below 1", max(errors) < 1)
    bench.bar("mixed stream, worst task's MAE / that of the stream's median", max(tasks), "below 1", max(tasks) < 1)
    share = statistics.fmean(within)
    bench.bar("p90 coverage, share of windows within 0.86 to 0.94", share, "at least 0.95", share >= 0.95)
    return streams


def _known_prompts(bench: Report, folder: Path) -> None:
    """Prompts whose outputs by four other models are known. The first half of the prompts only trains the predictor."""
    taus = []
    for seed in SEEDS:
        rng = random.Random(seed)
        groups = [list(group) for _, group in itertools.groupby(alpaca_items(folder, seed), key=lambda one: one.prompt)]
        predicted: list[tuple[Item, float]] = []
        predictor = CheckedPredictor(LengthPredictor())
        for index, group in enumerate(groups):
            rng.shuffle(group)
            for item in group[:_KNOWN_MODELS]:
                predictor.observe(predictor.predict(item.prompt, item.model), item.num_tokens, False)
            later = [(item, predictor.predict(item.prompt, item.model)) for item in group[_KNOWN_MODELS:]]
            for item, checked in later:
                if index >= len(groups) // 2:
                    predicted.append((item, checked.prediction.p50_tokens))
                predictor.observe(checked, item.num_tokens, False)
            fit_now(predictor)
        by_model = [
            [(item.num_tokens, median) for item, median in predicted if item.model == model] for model in ALPACA_MODELS
        ]
        taus.append(
            statistics.fmean(tau(np.array(p), np.array(n)) for n, p in (zip(*one, strict=True) for one in by_model))
        )
    value = statistics.median(taus)
    bench.bar("prompt answered by 4 other models, tau", value, "at least 0.55", value >= 0.55)


def _latency(bench: Report, streams: Sequence[Sequence[Outcome]]) -> None:
    """Over the last half of each stream, when the history is full. The bar is on the median, since the machine's speed
    changes.
    """
    late = [[one.seconds * 1000 for one in outcomes[len(outcomes) // 2 :]] for outcomes in streams]
    p50, p99 = ([float(np.percentile(times, share)) for times in late] for share in (50, 99))
    bench.figures["predict_ms"] = {"p50": p50, "p99": p99}
    bench.bar("one prediction, p50 ms (full memory)", statistics.median(p50))
    value = statistics.median(p99)
    bench.bar("one prediction, p99 ms (full memory)", value, "below 1 on an idle core", value < 1)


def _own(bench: Report, path: Path) -> None:
    found = report(replay(list(read_items(path)), SystemClock()))
    bench.figures["own"] = found
    pooled = found["pooled"]
    bench.bar(f"the served model's own answers ({found['num_answers']}), tau", pooled["tau"])
    ratio = pooled["mae"] / pooled["mae_median"]
    bench.bar("the same, MAE / that of the median", ratio, "below 1", ratio < 1)
    bench.bar("the same, p90 coverage", pooled["p90_coverage"], "0.86 to 0.94", 0.86 <= pooled["p90_coverage"] <= 0.94)


if __name__ == "__main__":
    sys.exit(main())
