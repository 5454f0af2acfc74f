"""Swap or recompute by the cost model: known models with the prefill speed of an H100, over links of known rates. Pure.

Assumptions. To compute a token takes 2 FLOPs for each parameter, and for each earlier token 4 for each element of the
queries of all layers, at half of the 989 TFLOP/s that an H100 SXM has in dense bf16. Reading the weights costs nothing,
as it is done for other sequences anyway. A swap takes 2 ms for its calls to kvstore beside the copies, which are one
after the other. A model on several GPUs has each part of its KV on a link of its own, so it has the figures of one GPU
that holds all of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loadtest.svg import Line
from muxmesh.kv_cost import CopyRates, break_even_bytes_per_s, crossover_tokens, recompute_s, swap_s
from muxmesh.step_cost import StepCost

H100_FLOPS = 989e12
UTILIZATION = 0.5
FIXED_SWAP_S = 0.002
LINKS: Mapping[str, float] = {"PCIe gen4 x16": 25e9, "PCIe gen5 x16": 50e9, "NVLink-C2C": 400e9}
"""Bytes per second in each direction that copies reach."""
GIGA = 1e9
_KV_ELEMENT_BYTES = 2


@dataclass(frozen=True, slots=True)
class KnownModel:
    """The sizes of a model that is computed in bf16."""

    name: str
    num_parameters: float
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_len: int

    @property
    def kv_bytes_per_token(self) -> int:
        """K and V of one token over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * _KV_ELEMENT_BYTES

    def prefill_cost(self, flops_per_s: float = H100_FLOPS * UTILIZATION) -> StepCost:
        """The cost of prefill steps at this speed."""
        attention = 4 * self.num_layers * self.num_heads * self.head_dim
        return StepCost(0.0, 2 * self.num_parameters / flops_per_s, attention / flops_per_s)

    def break_even(self, num_tokens: int) -> float:
        """Bytes per second in each direction at which a swap of so many tokens takes as long as to recompute them."""
        recomputed_s = recompute_s(num_tokens, self.prefill_cost())
        return break_even_bytes_per_s(num_tokens * self.kv_bytes_per_token, recomputed_s, FIXED_SWAP_S)

    def crossover(self, bytes_per_s: float) -> int | None:
        """The context from which on, up to the longest, a swap over a link of this rate is faster. None: never."""
        rates, cost = CopyRates(bytes_per_s, bytes_per_s, FIXED_SWAP_S), self.prefill_cost()
        return crossover_tokens(
            lambda tokens: swap_s(tokens * self.kv_bytes_per_token, rates),
            lambda tokens: recompute_s(tokens, cost),
            self.context_len,
        )


MODELS = (
    KnownModel("Llama 3.1 70B", 70.6e9, 80, 64, 8, 128, 131_072),
    KnownModel("Llama 3.1 8B", 8.03e9, 32, 32, 8, 128, 131_072),
    KnownModel("Llama 3.2 1B", 1.24e9, 16, 32, 8, 64, 131_072),
    KnownModel("Llama 2 7B", 6.74e9, 32, 32, 32, 128, 4096),
    KnownModel("SmolLM2 135M", 134.5e6, 30, 9, 3, 64, 8192),
)


def table() -> list[str]:
    """A Markdown table: for each model its crossover on each link, and the rate at which both are equal."""
    columns = ["model", "KV per token", *(f"{name}, {rate / GIGA:.0f} GB/s" for name, rate in LINKS.items())]
    rows = [f"| {' | '.join([*columns, 'equal at 1,024; 8,192 tokens, GB/s'])} |", "|---" * (len(columns) + 1) + "|"]
    for model in MODELS:
        found = [model.crossover(rate) for rate in LINKS.values()]
        cells = ["never" if first is None else f"{first:,} tokens" for first in found]
        lengths = [tokens for tokens in (1024, 8192) if tokens <= model.context_len]
        equal = "; ".join(_gigabytes(model.break_even(tokens)) for tokens in lengths)
        rows.append(f"| {model.name} | {model.kv_bytes_per_token / 1024:g} KiB | {' | '.join(cells)} | {equal} |")
    return rows


def _gigabytes(bytes_per_s: float) -> str:
    return "at no rate" if math.isinf(bytes_per_s) else f"{bytes_per_s / GIGA:.1f}"


def curves(lengths: Sequence[int]) -> list[Line]:
    """The break-even rate of each model in GB/s by context."""
    found = []
    for model in MODELS:
        known = [tokens for tokens in lengths if tokens <= model.context_len]
        found.append(Line(f"{model.name}, H100", known, [model.break_even(tokens) / GIGA for tokens in known]))
    return found


def limits(lengths: Sequence[int]) -> list[Line]:
    """The rates of the links in GB/s."""
    ends = (lengths[0], lengths[-1])
    return [
        Line(f"{name}: {rate / GIGA:.0f} GB/s", ends, (rate / GIGA, rate / GIGA), is_limit=True)
        for name, rate in LINKS.items()
    ]
