"""From measured times to shares of the card's ceilings, and tables of them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Figures = dict[str, Any]


def decode_bytes(weight_bytes: int, kv_bytes_per_token: int, batch: int, context: int) -> int:
    """Fewest bytes that a decode step reads: all weights once, and the KV of every sequence."""
    return weight_bytes + batch * context * kv_bytes_per_token


def prefill_flop(spec: Mapping[str, int], parameters: int, vocabulary: int, num_tokens: int) -> float:
    """Floating-point operations of a prompt: products of all layers, causal attention, one row of logits.

    ``vocabulary``: parameters of the tied embedding, which the layers do not multiply with.
    """
    attention = 4 * spec["layers"] * spec["heads"] * spec["head_dim"] * num_tokens * num_tokens / 2
    return 2 * (parameters - vocabulary) * num_tokens + attention + 2 * vocabulary


def speedup(together: Sequence[float], alone: Sequence[float]) -> float:
    """Work per second when all run at once, over that when one runs at a time: the sum of their relative speeds."""
    return sum(rate / own for rate, own in zip(together, alone, strict=True))


def failed_runs(done: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """One line for each worker of which runs failed; ``done``: results of `do_work_until` by what they ran beside."""
    return [
        f"{place}, worker {number}: {one['failed_runs']} of {one['runs']} runs failed: {one['first_failure']}"
        for place, results in done.items()
        for number, one in enumerate(results)
        if one["failed_runs"]
    ]


def decode_table(figures: Figures) -> str:
    """Milliseconds of a step, tokens/s and the share of the copy ceiling of each decode case."""
    if not figures.get("decode") or "ceilings" not in figures:
        return ""
    loaded = figures["load, graphs True"]
    lines = [f"{'DECODE':>6} {'CONTEXT':>8} {'GRAPHS':>7} {'STEPS':>6} {'MS':>9} {'TOKENS/S':>10} {'OF COPY':>8}"]
    for case in figures["decode"]:
        moved = decode_bytes(loaded["weight_bytes"], loaded["kv_bytes_per_token"], case["batch"], case["context"])
        case["of_copy_ceiling"] = moved / (case["ms"] / 1e3) / figures["ceilings"]["copy_bytes_s"]
        case["tokens_per_s"] = case["batch"] / (case["ms"] / 1e3)
        lines.append(
            f"{case['batch']:6} {case['context']:8} {'yes' if case['graphs'] else 'no':>7} {case['num_steps']:6} "
            f"{case['ms']:9.3f} {case['tokens_per_s']:10.0f} {case['of_copy_ceiling']:8.2f}"
        )
    return "\n".join(lines)


def engine_table(figures: Figures) -> str:
    """Milliseconds of a decode step in the whole engine and in its runner, and what part of it the host's work adds."""
    lines = [f"{'ENGINE':>6} {'RUNS OF':>8} {'MS':>9} {'RUNNER MS':>10} {'HOST':>6} {'TOKENS/S':>10}"]
    for case in figures.get("whole engine", ()):
        case["host_part"] = 1 - case["runner_ms"] / case["ms"]
        case["tokens_per_s"] = case["batch"] / (case["ms"] / 1e3)
        lines.append(
            f"{case['batch']:6} {case['max_steps']:8} {case['ms']:9.3f} {case['runner_ms']:10.3f} "
            f"{case['host_part']:6.0%} {case['tokens_per_s']:10.0f}"
        )
    return "\n".join(lines) if lines[1:] else ""


def prefill_table(figures: Figures, vocabulary: int) -> str:
    """Milliseconds, tokens/s and the share of the ceiling of products for each length of prompt."""
    if not figures.get("prefill") or "ceilings" not in figures:
        return ""
    loaded = figures["load, graphs True"]
    lines = [f"{'PROMPT':>7} {'MS':>9} {'TOKENS/S':>10} {'OF PRODUCT':>11}"]
    for case in figures["prefill"]:
        flop = prefill_flop(loaded["spec"], loaded["parameters"], vocabulary, case["num_tokens"])
        case["of_product_ceiling"] = flop / (case["ms"] / 1e3) / figures["ceilings"]["flop_s"]
        case["tokens_per_s"] = case["num_tokens"] / (case["ms"] / 1e3)
        lines.append(
            f"{case['num_tokens']:7} {case['ms']:9.3f} {case['tokens_per_s']:10.0f} {case['of_product_ceiling']:11.2f}"
        )
    return "\n".join(lines)


def three_models_table(figures: Figures) -> str:
    """Tokens per second of each worker alone and together, and the speed-up of each choice of shares."""
    if "three models" not in figures:
        return ""
    found = figures["three models"]
    alone = f"three models, (prefill, decode) tokens/s, one at a time: {_rounded(found['tokens_per_s_alone'])}"
    together = (
        f"under MPS, shares {case['shares']}: {_rounded(case['tokens_per_s'])}; "
        f"{case['speed-up']:.2f} times the work of one after another (aim: 1.5)"
        for case in found["under MPS"]
    )
    return "\n".join((alone, *together))


def _rounded(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.0f}" for value in values)
