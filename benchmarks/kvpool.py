"""The KV pool: speed of allocation, utilisation, time of a hand-off and of a prefix hit, size of the metadata."""

from __future__ import annotations

import asyncio
import gc
import random
import statistics
import sys
import time
import tracemalloc
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.mesh_process import UpProcess, up
from benchmarks.report import Report
from kvstore.block_table import BlockTable
from kvstore.slab_pool import SlabPool
from kvstore.unit import Unit
from kvstore.unit_model import UnitModel
from muxmesh.block_hashes import block_hashes
from muxmesh.client import Message
from muxmesh.models.model_spec import KvShape
from muxmesh.types import KvDemand, QueuedRequest, Role, SchedulingState

MIB = 1 << 20
SMALL = KvShape(num_layers=30, num_kv_heads=3, head_dim=64, block_size=16, dtype_bytes=4)
"""SmolLM2-135M: 45 KiB a token."""
LARGE = KvShape(num_layers=32, num_kv_heads=8, head_dim=128, block_size=16, dtype_bytes=4)
"""Llama-3-8B's shape in f32: 256 KiB a token."""
NUM_OPERATIONS = 1_000_000
SYSTEM_TOKENS = 1000


def _table(num_slabs: int, blocks_per_slab: dict[str, int]) -> BlockTable:
    table = BlockTable(SlabPool(num_slabs))
    for model, count in blocks_per_slab.items():
        table.add_model(model, count)
    return table


def allocation_speed() -> tuple[float, float]:
    """Token blocks allocated per second and p99 of an allocation in seconds, in a pool that is 90 % full.

    Over the second half of NUM_OPERATIONS random operations.
    """
    rng = random.Random(1)
    per_slab = 16 * MIB // SMALL.token_block_bytes
    table = _table(40_000 // per_slab, {"a": per_slab})
    capacity = 40_000 // per_slab * per_slab
    held: list[tuple[int, ...]] = []
    in_use, seconds, num_taken = 0, [], 0
    for operation in range(NUM_OPERATIONS):
        if in_use < 0.9 * capacity:
            wanted = rng.randint(1, 64)
            started_at_s = time.perf_counter()
            taken = table.allocate("a", wanted)
            elapsed_s = time.perf_counter() - started_at_s
            assert taken is not None
            held.append(taken.block_ids)
            in_use += wanted
            if operation > NUM_OPERATIONS // 2:
                seconds.append(elapsed_s)
                num_taken += wanted
        else:
            at = rng.randrange(len(held))
            held[at], held[-1] = held[-1], held[at]
            in_use -= len(held[-1])
            table.free("a", held.pop())
    return num_taken / sum(seconds), statistics.quantiles(seconds, n=100)[98]


def use_at_first_refusal() -> tuple[list[float], list[float]]:
    """Shares of the pool in use at the first refusal, for two models in one pool and in two fixed halves.

    One of the models, chosen at random in each of 50 runs, gets ten times as many requests as the other.
    """
    shared, split = [], []
    for seed in range(50):
        rng = random.Random(seed)
        arrivals = _arrivals(rng)
        shared.append(_use_at_refusal(arrivals, lambda num_slabs: [num_slabs]))
        split.append(_use_at_refusal(arrivals, lambda num_slabs: [num_slabs // 2] * 2))
    return shared, split


def _arrivals(rng: random.Random) -> list[tuple[str, int, int]]:
    """Model, token blocks and lifetime in arrivals of each request. They last so long that the load only grows."""
    popular = rng.choice("ab")
    other = "b" if popular == "a" else "a"
    arrivals = []
    for _ in range(20_000):
        model = popular if rng.random() < 10 / 11 else other
        arrivals.append((model, rng.randint(4, 64), int(rng.expovariate(1 / 20_000))))
    return arrivals


def _use_at_refusal(arrivals: list[tuple[str, int, int]], divide: object) -> float:
    shapes = {"a": SMALL, "b": LARGE}
    slab, num_slabs = 16 * MIB, 512
    per_slab = {model: slab // shape.token_block_bytes for model, shape in shapes.items()}
    parts = divide(num_slabs)  # type: ignore[operator]
    if len(parts) == 1:
        table = _table(num_slabs, per_slab)
        tables = dict.fromkeys(shapes, table)
    else:
        tables = {m: _table(n, {m: per_slab[m]}) for m, n in zip(shapes, parts, strict=True)}
    ends: dict[int, list[tuple[str, tuple[int, ...]]]] = {}
    for now, (model, num_blocks, lasts) in enumerate(arrivals):
        for ended, block_ids in ends.pop(now, []):
            tables[ended].free(ended, block_ids)
        taken = tables[model].allocate(model, num_blocks)
        if taken is None:
            break
        ends.setdefault(now + 1 + lasts, []).append((model, taken.block_ids))
    used = sum(tables[model].num_in_use(model) * shapes[model].token_block_bytes for model in shapes)
    return used / (num_slabs * slab)


def metadata_share() -> float:
    """Bytes of the Python objects of a full unit over the KV bytes that they describe."""
    pool_bytes = 4096 * MIB
    gc.collect()
    tracemalloc.start()
    unit = Unit(pool_bytes, 16 * MIB, {"a": UnitModel(SMALL, 10_000, 8192)})
    for role in Role:
        unit.attach(role, "a", "x", 1).ready = True
    for entry_id in range(10_000):
        hashes = block_hashes([entry_id] * 512, SMALL.block_size, b"root")
        unit.offer("r", QueuedRequest(entry_id, "a", SchedulingState(0, 0.0), KvDemand(512, 512, hashes, 511)))
        if not (given := unit.schedule(0.0, 0.0).credits):
            break
        names = {worker.role: worker.name for worker in unit.workers.values()}
        lease = unit.acquire(given[0].lease.ref, names[Role.PREFILL])
        unit.move(lease.ref, names[Role.PREFILL], names[Role.DECODE], 512, (1,))
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return size / unit.leased_bytes()


async def handoff_s() -> list[float]:
    """Seconds from the first to the second token on an idle mesh whose steps take no time: hand-off and one step."""
    with TemporaryDirectory() as folder:
        config = Path(folder) / "mesh.yaml"
        config.write_text("units:\n  - models:\n      - {name: sim, engine: sim}\n")
        async with up("-c", str(config)) as mesh:
            gaps = []
            for number in range(300):
                stream = mesh.client.stream(f"prompt {number}", max_new_tokens=2, temperature=0)
                await anext(stream)
                first_at_s = time.perf_counter()
                await anext(stream)
                gaps.append(time.perf_counter() - first_at_s)
                await stream.aclose()
            return gaps[100:]


async def prefix_ttft_s(mesh: UpProcess) -> tuple[list[float], list[float], int]:
    """Seconds of TTFT of misses and of hits on a prefix of SYSTEM_TOKENS tokens, and the cached tokens of a hit."""
    misses: list[float] = []
    hits: list[float] = []
    num_cached = 0
    for number in range(7):
        # Each round has its own system prompt: a miss, then a hit with another question.
        system = f"You are number {number}. " + "Answer in the language of the question and be brief. " * 90
        for times, question in ((misses, "What is the capital of France?"), (hits, "And what is the one of Spain?")):
            prompt = [Message("system", system), Message("user", question)]
            completion = await mesh.client.generate(prompt, max_new_tokens=1, temperature=0)
            times.append(completion.timings.ttft_s)
            num_cached = completion.prompt.num_cached_tokens
            assert completion.prompt.num_tokens >= SYSTEM_TOKENS
    return misses, hits, num_cached


async def copied_bytes(mesh: UpProcess) -> int:
    """KV bytes that the workers wrote minus those of the tokens that they computed."""
    await mesh.client.generate("Once upon a time", max_new_tokens=32, temperature=0)
    models = {model.name: model.kv_bytes_per_token for model in await mesh.client.list_models()}
    (unit,) = (await mesh.client.status()).units
    return sum(w.kv_bytes_written - w.num_computed_tokens * models[w.model] for w in unit.workers)


async def _on_the_mesh(report: Report) -> None:
    gaps = await handoff_s()
    async with up() as mesh:
        misses, hits, num_cached = await prefix_ttft_s(mesh)
        copied = await copied_bytes(mesh)
    report.figures |= {"handoff_s": gaps, "ttft_miss_s": misses, "ttft_hit_s": hits, "num_cached_tokens": num_cached}
    median_ms = statistics.median(gaps) * 1e3
    report.bar("first to second token, steps of no time, p50 ms", median_ms, "under 3", median_ms < 3)
    report.bar("KV bytes copied in hand-offs", copied, "0", copied == 0)
    ratio = statistics.median(misses) / statistics.median(hits)
    report.bar(f"TTFT of a miss / of a hit on {num_cached} cached tokens", ratio, "at least 5", ratio >= 5)


def main() -> int:
    """Measures; exit code 1 if a bar is missed."""
    report = Report("kvpool")
    speed, p99_s = allocation_speed()
    report.bar("token blocks taken per second, 90 % full", speed)
    report.bar("p99 of one take (1..64 token blocks), us", p99_s * 1e6)
    shared, split = use_at_first_refusal()
    report.figures |= {"used_at_refusal_shared": shared, "used_at_refusal_split": split}
    report.bar("pool in use at the first refusal, worst of 50", min(shared), "at least 0.95", min(shared) >= 0.95)
    report.bar("the same with fixed halves, median", statistics.median(split))
    share = metadata_share()
    report.bar("metadata / KV bytes", share, "under 0.005", share < 0.005)
    asyncio.run(_on_the_mesh(report))
    return 0 if report.write() else 1


if __name__ == "__main__":
    sys.exit(main())
