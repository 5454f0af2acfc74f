"""Our engine and vLLM's on the same prompts, in alternation, SmolLM2 in f32: prefill, decode, share of the machine.

``make bench-engine VLLM_PYTHON=path`` names an interpreter with vLLM. Without one, only our own figures are printed.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.report import Report
from muxmesh.cli.common import cache_dir
from muxmesh.config.schema import DEFAULT_MODEL
from muxmesh.engine.native.kernel_cache import kernel_cache_dir
from muxmesh.models.catalog import CATALOG
from muxmesh.models.model_download import ensure_model
from muxmesh.models.model_spec import ModelSpec, read_model_spec
from muxmesh.models.weight_image import ensure_image

THREADS = 2
BATCH_CAP = 16
ROUNDS = 5
STEPS = 24
HERE = Path(__file__).parent
PREFILL = "prefill 4x512"
CASES = {f"decode {batch} at {context}": (batch, context) for batch in (1, 16) for context in (32, 512)}
Runs = dict[str, dict[str, list[float]]]
"""Case → engine → tokens per second in each round."""


class Engine:
    """A child process that serves one request at a time and sleeps in between."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str]) -> None:
        self.name = name
        self._process = subprocess.Popen(
            command,
            env={**os.environ, "OMP_NUM_THREADS": str(THREADS), **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._read_response()

    def ask(self, **request: Any) -> Any:
        """Sends one request and waits for the response."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read_response()

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _read_response(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with exit code {self._process.wait()}")
        return json.loads(line)


def read_bandwidth(values: torch.Tensor) -> float:
    """Bytes per second of a sum over ``values``, which are larger than any cache, by `THREADS` threads; best of 3."""
    return max(values.nbytes / _seconds(values.sum) for _ in range(3))


def gemm_flops() -> float:
    """FLOP per second of a large f32 matrix product by `THREADS` threads; best of 3."""
    a = torch.ones(2048, 2048)
    return max(2 * 2048**3 / _seconds(lambda: a @ a) for _ in range(3))


def _seconds(work: Any) -> float:
    started_at_s = time.perf_counter()
    work()
    return time.perf_counter() - started_at_s


def measure(engine: Engine, case: str, rng: np.random.Generator) -> float:
    """Tokens per second."""

    def prompts(batch: int, length: int) -> list[list[int]]:
        return [rng.integers(100, 40_000, length).tolist() for _ in range(batch)]

    if case == PREFILL:
        seconds: float = engine.ask(prefill=prompts(4, 512))
        return 4 * 512 / seconds
    batch, context = CASES[case]
    steps: list[float] = engine.ask(decode=prompts(batch, context), steps=STEPS)
    return batch / statistics.median(steps)


def main() -> int:
    """Measures, prints, writes; exit code 1 if a bar is missed."""
    torch.set_num_threads(THREADS)
    folder = ensure_model(CATALOG[DEFAULT_MODEL], cache_dir(), lambda what, done, total: None)
    spec = read_model_spec(folder)
    image = ensure_image(folder, spec, "panels", cache_dir(), lambda done, total: None)
    vllm = os.environ.get("VLLM_PYTHON")
    runs: Runs = {case: {} for case in (PREFILL, *CASES)}
    ceilings: list[tuple[float, float]] = []
    with ExitStack() as stack:
        engines = []
        ours = [sys.executable, "-m", "benchmarks.engine_ours", str(folder), str(image), str(BATCH_CAP), str(THREADS)]
        engines.append(Engine("muxmesh", ours, {"NUMBA_CACHE_DIR": str(kernel_cache_dir(cache_dir()))}))
        stack.callback(engines[0].close)
        for mode in ("eager", "compiled") if vllm else ():
            command = [str(vllm), str(HERE / "engine_vllm.py"), str(folder), mode, str(BATCH_CAP)]
            print(f"starting vLLM ({mode}) ...", flush=True)
            engines.append(Engine(f"vllm {mode}", command, _VLLM))
            stack.callback(engines[-1].close)
        for engine in engines:
            engine.ask(prefill=[[7] * 64])
        rng = np.random.default_rng(0)
        large = torch.ones(1 << 28)
        for round_ in range(ROUNDS):
            ceilings.append((read_bandwidth(large), gemm_flops()))
            for case, speeds in runs.items():  # in short intervals: the machine's speed changes within a minute
                for engine in engines[:: 1 if round_ % 2 == 0 else -1]:
                    speeds.setdefault(engine.name, []).append(measure(engine, case, rng))
                print(case, {name: round(values[-1], 1) for name, values in speeds.items()}, flush=True)
    report = _report(spec, runs, ceilings)
    return 0 if report.write() else 1


_VLLM = {
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}


def _report(spec: ModelSpec, runs: Runs, ceilings: list[tuple[float, float]]) -> Report:
    report = Report("engine")
    bandwidth, flops = (statistics.median(values) for values in zip(*ceilings, strict=True))
    report.figures = {"tokens_per_s": runs, "read_bytes_per_s": bandwidth, "gemm_flops": flops}
    mine = {case: statistics.median(speeds["muxmesh"]) for case, speeds in runs.items()}
    weight_bytes, inner = 4 * spec.num_parameters, spec.num_parameters - spec.vocab_size * spec.hidden_size
    report.bar("share of read bandwidth, decode 1 at 32", mine["decode 1 at 32"] * weight_bytes / bandwidth)
    for case in ("decode 16 at 32", PREFILL):
        parameters = inner if case == PREFILL else spec.num_parameters
        report.bar(f"share of GEMM speed, {case}", mine[case] * 2 * parameters / flops)
    for case, speeds in runs.items():
        for other in [name for name in speeds if name != "muxmesh"]:
            ratio = statistics.median(a / b for a, b in zip(speeds["muxmesh"], speeds[other], strict=True))
            if case == PREFILL:
                least = 0.95 if other.endswith("compiled") else None
            else:
                least = 1.4 if case.startswith("decode 1 ") else 1.3
            required = () if least is None else (f"at least {least}", ratio >= least)
            report.bar(f"{case}, against {other}", ratio, *required)
    return report


if __name__ == "__main__":
    sys.exit(main())
