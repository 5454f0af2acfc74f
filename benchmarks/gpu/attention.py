"""`python -m benchmarks.gpu.attention`: decode attention with other tiles and splits than the engine's, as JSON lines.

Each line is one candidate in one case, with its share of the measured copy; the last line names the best candidate, by
the geometric mean of its shares, beside the engine's own. What is best here goes into `attention_plan`.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.attention_times import AttentionSizes, AttentionTimer
from benchmarks.gpu.ceilings import measure_ceilings
from muxmesh.device.torch_device import CudaDevice
from muxmesh.engine.native.cuda.attention_plan import AttentionPlan, TileConfig

CASES = tuple(itertools.product((1, 4, 16, 64), (512, 2048, 8192)))
TILES = (  # queries, keys, warps, stages
    TileConfig(16, 64, 4, 5),
    TileConfig(16, 64, 4, 3),
    TileConfig(16, 64, 4, 7),
    TileConfig(16, 32, 4, 7),
    TileConfig(16, 128, 4, 3),
    TileConfig(16, 128, 8, 5),
)
PROGRAMS_PER_SM = (1, 2, 3, 4)


def candidates(plan: AttentionPlan, num_sms: int) -> Iterator[AttentionPlan]:
    """The engine's plan, then its variants."""
    yield plan
    for tile, programs in itertools.product(TILES, PROGRAMS_PER_SM):
        changed = dataclasses.replace(plan, decode=tile, num_slots=programs * num_sms)
        if changed != plan:
            yield changed


def sweep(device: CudaDevice, sizes: AttentionSizes) -> Iterator[dict[str, Any]]:
    """Times every candidate in every case."""
    copy_bytes_s = measure_ceilings(1 << 30, 1024).copy_bytes_s
    timer = AttentionTimer(device, sizes)
    shares: dict[str, list[float]] = {}
    for plan in candidates(timer.plan, device.num_sms):
        named = {"tile": dataclasses.astuple(plan.decode), "num_slots": plan.num_slots}
        found = [timer.measure(batch, context, plan) for batch, context in CASES]
        for case in found:
            yield {**named, **case, "of_copy": case["bytes_s"] / copy_bytes_s}
        shares[json.dumps(named)] = [case["bytes_s"] / copy_bytes_s for case in found]
    means = {name: statistics.geometric_mean(values) for name, values in shares.items()}
    best, own = max(means, key=lambda name: means[name]), next(iter(means))
    yield {"copy_bytes_s": copy_bytes_s, "best": json.loads(best), "mean": means[best], "engine's mean": means[own]}


def main() -> None:
    """Prints the sweep of one kind of model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heads", type=int, nargs=3, default=(32, 8, 128), help="heads, KV heads, head size")
    heads, kv_heads, head_dim = parser.parse_args().heads
    device = CudaDevice()
    with torch.inference_mode(), device.compute():
        for line in sweep(device, AttentionSizes(heads, kv_heads, head_dim, 64 * 8192)):
            sys.stdout.write(json.dumps(line) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
