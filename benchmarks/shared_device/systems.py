"""The systems under comparison: meshes that differ in who may compute, and one vLLM server for each model.

Every system has the same cores, the same KV memory in sum and the same batch cap for each model. A mesh is started anew
for each run; vLLM takes minutes to start, so its servers stay, stopped by a signal while others are measured.
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.mesh_process import UpProcess, children_of, mesh_target
from benchmarks.report import OUT
from benchmarks.shared_device.loads import VOCABULARY
from benchmarks.vs_vllm import vllm_server
from loadtest.openai_target import OpenAiTarget
from loadtest.target import Piece, ServedModel, StreamEnd, Target
from loadtest.workload import PlannedRequest

TEMPERATURE = 0.7
KV_MIB = 2048
"""KV memory of all models together: more than their batches need."""
MAX_MODEL_LEN = 2048
_FIRST_VLLM_PORT = 8310


@dataclass(frozen=True, slots=True)
class Model:
    """A model of the benchmark. ``content``: what is sent to it, as settings of a workload line."""

    name: str
    folder: Path
    content: str


def mesh_config(
    system: str, models: Sequence[Model], max_num_seqs: int, cores: Sequence[int], slo_scale: float | None = None
) -> dict[str, Any]:
    """The configuration of a mesh. ``system``: a mode of the arbiter, or `spatial`; `adbs@50`: with that compute share.

    `spatial` is MuxServe's: each model has a device of its own. Here that is one core and an equal part of the memory.
    The other modes have one unit, whose models may use all ``cores`` and all of the memory.
    """
    mode, _, share = system.partition("@")
    entries = [
        {
            "name": model.name, "source": str(model.folder), "max_num_seqs": max_num_seqs,
            "max_model_len": MAX_MODEL_LEN, "slo": {"scale": slo_scale} if slo_scale else None,
            "compute_share": int(share or 100),
        }
        for model in models
    ]  # fmt: skip
    if mode != "spatial":
        unit = {"cores": list(cores), "kv_pool": f"{KV_MIB}MiB", "arbiter": {"mode": mode}, "models": entries}
        return {"units": [unit]}
    if len(models) != len(cores):
        raise ValueError(f"spatial: {len(models)} models on {len(cores)} cores; each needs one of its own")
    return {
        "units": [
            {"name": f"unit{core}", "cores": [core], "kv_pool": f"{KV_MIB // len(models)}MiB", "models": [entry]}
            for core, entry in zip(cores, entries, strict=True)
        ]
    }


def sim_config(mode: str, models: Sequence[Mapping[str, Any]], kv_mib: int) -> dict[str, Any]:
    """The configuration of a mesh of sim engines; ``mode`` as in `mesh_config`. ``kv_mib``: of all models together.

    With `spatial` the unit of each model computes one step at a time.
    """
    if mode != "spatial":
        unit = {"kv_pool": f"{kv_mib}MiB", "slab": "1MiB", "arbiter": {"mode": mode}, "models": list(models)}
        return {"units": [unit]}
    return {
        "units": [
            {
                "name": f"unit{n}", "cores": [n], "kv_pool": f"{kv_mib // len(models)}MiB", "slab": "1MiB",
                "arbiter": {"mode": "temporal"}, "models": [model],
            }
            for n, model in enumerate(models)
        ]
    }  # fmt: skip


def mesh(name: str, config: Mapping[str, Any]) -> AbstractAsyncContextManager[tuple[UpProcess, Target]]:
    """A new mesh, and the target that sends to it."""
    return mesh_target(f"shared_device_{name}", config, TEMPERATURE)


class RoutedTarget:
    """A `Target` of several servers with one model each."""

    def __init__(self, targets: Mapping[str, Target]) -> None:
        self.name = "one server for each model"
        self._targets = targets

    async def models(self) -> list[ServedModel]:
        for target in self._targets.values():
            await target.models()
        return [ServedModel(name, VOCABULARY) for name in self._targets]

    def stream(self, request: PlannedRequest) -> AsyncIterator[Piece | StreamEnd]:
        return self._targets[request.model or ""].stream(replace(request, model=None))

    async def close(self) -> None:
        for target in self._targets.values():
            await target.close()


class VllmServers:
    """One server for each model on the same cores. They are stopped except inside `running`."""

    def __init__(self, python: str, models: Sequence[Model], max_num_seqs: int, compiled: bool) -> None:
        self._stack = ExitStack()
        self._ports = {model.name: _FIRST_VLLM_PORT + index for index, model in enumerate(models)}
        self._pids: list[int] = []
        for model in models:
            # Waiting threads must not spin: each server would take the cores from the others.
            more = ["--max-num-seqs", str(max_num_seqs), *([] if compiled else ["--enforce-eager"])]
            log, kv_gib = OUT / f"vllm_{model.name}.log", KV_MIB / 1024 / len(models)
            server = vllm_server(
                python, model.folder, self._ports[model.name], kv_gib, log, *more,
                OMP_WAIT_POLICY="PASSIVE", KMP_BLOCKTIME="0", VLLM_NO_USAGE_STATS="1",
            )  # fmt: skip
            self._pids.append(self._stack.enter_context(server))
            self._signal(signal.SIGSTOP)

    def close(self) -> None:
        """Ends the servers."""
        self._signal(signal.SIGCONT)
        self._stack.close()

    @contextmanager
    def running(self) -> Iterator[None]:
        """The servers compute inside this context only."""
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP)

    @asynccontextmanager
    async def target(self) -> AsyncIterator[Target]:
        """The running servers, as one target."""
        with self.running():
            target = RoutedTarget(
                {
                    name: OpenAiTarget(f"http://127.0.0.1:{port}", VOCABULARY, TEMPERATURE, None)
                    for name, port in self._ports.items()
                }
            )
            try:
                await target.models()
                yield target
            finally:
                await target.close()

    def _signal(self, number: int) -> None:
        for root in self._pids:
            for pid in (root, *children_of(root)):
                os.kill(pid, number)
