"""Swap against recompute by context length: measured here with the default model, and by the cost model on GPUs.

`python -m benchmarks.swap_cost [--plot FILE]` measures prefill, and copies out and in, raw and int8, at contexts from
64 to 2,048 tokens; checks the cost model against the measured seconds; prints the table of `benchmarks.break_even`; and
draws, by context, the copy rate at which a swap takes as long as to recompute.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.break_even import GIGA, curves, limits, table
from benchmarks.report import OUT, Report
from benchmarks.swap import FORMATS, STEP_TOKENS, Scorer
from loadtest.svg import Line, plot, svg_file
from muxmesh.cli.common import cache_dir
from muxmesh.config.model_config import ModelConfig
from muxmesh.config.schema import DEFAULT_MODEL
from muxmesh.device.kv_codec import encoded_bytes
from muxmesh.kv_cost import CopyRates, break_even_bytes_per_s, crossover_tokens, recompute_s, swap_s
from muxmesh.models.prepared_model import prepare_model
from muxmesh.step_cost import StepCost, context_of, least_squares_cost
from muxmesh.types import KvFormat

CONTEXTS = (64, 128, 256, 512, 1024, 2048)
GPU_CONTEXTS = (64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536)
ROUNDS = 5
_FEW_TOKENS = 512


@dataclass(frozen=True)
class Measured:
    """Seconds of one context, the least of all rounds: to compute it, and by format the copies out and in."""

    prefill_s: float
    out_s: Mapping[KvFormat, float]
    in_s: Mapping[KvFormat, float]


def measure(scorer: Scorer, num_tokens: int) -> Measured:
    """Times ``num_tokens`` tokens in `ROUNDS` rounds, in more if they are few. Other load lengthens some of them."""
    rounds = [scorer.times(num_tokens) for _ in range(ROUNDS * max(1, _FEW_TOKENS // num_tokens))]

    def least(key: str) -> float:
        return min(one[key] for one in rounds)

    return Measured(
        least("prefill"),
        {kv_format: least(f"{kv_format} out") for kv_format in FORMATS},
        {kv_format: least(f"{kv_format} in") for kv_format in FORMATS},
    )


def cost_of(measured: Mapping[int, Measured]) -> StepCost:
    """The cost of prefill steps that fits the measured prefills."""
    return least_squares_cost(
        [(-(-tokens // STEP_TOKENS), tokens, context_of(0, tokens), one.prefill_s) for tokens, one in measured.items()]
    )


def rates_of(measured: Measured, num_bytes: int, kv_format: KvFormat) -> CopyRates:
    """The rates of one context's copies, in encoded bytes."""
    return CopyRates(num_bytes / measured.out_s[kv_format], num_bytes / measured.in_s[kv_format])


def here(report: Report, scorer: Scorer) -> list[Line]:
    """Measures on this CPU. Returns the break-even rate by context, and the measured rate as a limit."""
    scorer.prefault()
    scorer.times(CONTEXTS[0])
    measured = {tokens: measure(scorer, tokens) for tokens in CONTEXTS}
    cost = cost_of(measured)
    longest = CONTEXTS[-1]
    rates = {
        kv_format: rates_of(measured[longest], encoded_bytes(scorer.shape, longest, kv_format), kv_format)
        for kv_format in FORMATS
    }
    rows: dict[str, dict[str, float]] = {}
    for tokens, one in measured.items():
        row = rows[str(tokens)] = {
            "prefill_s": one.prefill_s,
            "prefill_by_the_model": recompute_s(tokens, cost, chunk=STEP_TOKENS) / one.prefill_s,
        }
        for kv_format in FORMATS:
            swapped_s = one.out_s[kv_format] + one.in_s[kv_format]
            modelled_s = swap_s(encoded_bytes(scorer.shape, tokens, kv_format), rates[kv_format])
            row |= {
                f"{kv_format}_out_s": one.out_s[kv_format],
                f"{kv_format}_in_s": one.in_s[kv_format],
                f"{kv_format}_swap_by_the_model": modelled_s / swapped_s,
                f"recompute_over_{kv_format}_swap": one.prefill_s / swapped_s,
            }
            report.bar(f"{tokens} tokens: recompute / swap, {kv_format}", one.prefill_s / swapped_s)
    report.figures["here"] = {
        "contexts": rows,
        "prefill_cost": {
            "base_s": cost.base_s, "per_token_s": cost.per_token_s, "per_context_s": cost.per_context_s
        },
        "gb_per_s": {
            kv_format: {"out": one.out_bytes_per_s / GIGA, "in": one.in_bytes_per_s / GIGA}
            for kv_format, one in rates.items()
        },
        "crossover_tokens": {
            kv_format: _crossover(scorer, kv_format, rates[kv_format], cost) for kv_format in FORMATS
        },
    }  # fmt: skip
    equal = [
        break_even_bytes_per_s(encoded_bytes(scorer.shape, tokens, "raw"), measured[tokens].prefill_s) / GIGA
        for tokens in CONTEXTS
    ]
    raw = rates["raw"]
    rate = 2 / (1 / raw.out_bytes_per_s + 1 / raw.in_bytes_per_s) / GIGA
    return [
        Line("SmolLM2 135M in f32, this CPU, measured", CONTEXTS, equal, marks=True),
        Line(f"copies on this CPU: {rate:.1f} GB/s", (CONTEXTS[0], longest), (rate, rate), is_limit=True),
    ]


def _crossover(scorer: Scorer, kv_format: KvFormat, rates: CopyRates, cost: StepCost) -> int | None:
    return crossover_tokens(
        lambda tokens: swap_s(encoded_bytes(scorer.shape, tokens, kv_format), rates),
        lambda tokens: recompute_s(tokens, cost, chunk=STEP_TOKENS),
        CONTEXTS[-1],
    )


def draw(here_lines: Sequence[Line]) -> str:
    """The plot as the text of a file. ``here_lines``: as of `here`."""
    title = "Copy rate at which a swap takes as long as to recompute"
    drawn = [*curves(GPU_CONTEXTS), here_lines[0], *limits(GPU_CONTEXTS), here_lines[1]]
    return svg_file(plot(title, "context, tokens", "GB/s", drawn, log_x=True, log_y=True))


def main() -> int:
    """Measures, prints and draws."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plot", type=Path, default=OUT / "swap_or_recompute.svg", help="where to write the plot")
    arguments = parser.parse_args()
    report = Report("swap_cost")
    with TemporaryDirectory() as state_dir:
        prepared = prepare_model(
            ModelConfig(name=DEFAULT_MODEL), "panels", Path(state_dir), cache_dir(), lambda what, done, total: None
        )
    assert prepared.folder is not None
    assert prepared.image is not None
    measured = here(report, Scorer(prepared.folder, prepared.image))
    report.figures["gpu"] = table()
    print("\n".join(table()))
    holds = report.write()
    arguments.plot.write_text(draw(measured))
    print(f"{arguments.plot} written")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
