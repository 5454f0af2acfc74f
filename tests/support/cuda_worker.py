"""A process that attaches to a unit on the fake driver as a worker, and uses the pool as its input says.

    python -m tests.support.cuda_worker SOCKET ROLE

Kernels are interpreted: its tensors are the CPU's, over the addresses at which the driver maps the unit's memory. Each
line of input is a JSON array, each line of output a JSON object:

    input                            output
                                     {"worker", "transport", "num_sms", "device", "weights_bytes"} or {"error"}
    ["write", block ids, byte]       {}
    ["read", block ids]              {"bytes": the distinct bytes of each token block}
    ["write_kv", block ids, n]       {}: the kernel writes the KV of n tokens (`random_kv`)
    ["attend", block ids, n]         {"outputs": of the kernel, for the query of the last token (`random_q`), by layer}
    ["write_weights", text]          {}
    ["read_weights", length]         {"text"}
    ["load_weights", image]          {"norm"}: the values of that tensor; the weights are loaded as an engine does
    ["resources"]                    what of the device it has open or mapped, by name
    (the unit is lost)               {"lost": true}, and it exits
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from kvstore.attach_protocol import BEAT_EVERY_S
from muxmesh.clock import SystemClock
from muxmesh.device.cuda_pool import CudaPool
from muxmesh.engine.native.cuda.attention import decode_attention
from muxmesh.engine.native.cuda.attention_plan import AttentionPlan
from muxmesh.engine.native.cuda.kv_layout import KvLayout
from muxmesh.engine.native.cuda.weights import load_weights
from muxmesh.errors import MeshError
from muxmesh.types import Role
from tests.support.cuda_worker_kv import NUM_HEADS, SHAPE, random_kv, random_q
from tests.support.fake_driver import device_resources
from tests.support.kv_rows import write_kv
from worker.attachment import Attachment, attach, open_worker_device


def show(**values: Any) -> None:
    print(json.dumps(values), flush=True)


class Worker:
    """An attached worker. Its token blocks are those of `SHAPE`."""

    def __init__(self, attachment: Attachment) -> None:
        assert isinstance(attachment.pool, CudaPool)
        self._pool, self._weights = attachment.pool, attachment.weights

    def blocks(self, block_ids: list[int]) -> list[torch.Tensor]:
        """The bytes of token blocks, in the pool itself."""
        offsets = self._pool.geometry(SHAPE).block_offsets(block_ids)
        memory, size = self._pool.elements(torch.uint8), SHAPE.token_block_bytes
        return [memory[int(offset) * SHAPE.dtype_bytes :][:size] for offset in offsets]

    def run(self, command: str, *arguments: Any) -> dict[str, Any]:
        """Runs a line of input; returns the values of the line of output."""
        assert self._weights is not None
        weights = self._weights.memory
        match command:
            case "write":
                for block in self.blocks(arguments[0]):
                    block.fill_(arguments[1])
            case "read":
                return {"bytes": [torch.unique(block).tolist() for block in self.blocks(arguments[0])]}
            case "write_kv":
                self._write_kv(*arguments)
            case "attend":
                return {"outputs": [self._attend(layer, *arguments) for layer in range(SHAPE.num_layers)]}
            case "write_weights":
                text = arguments[0].encode()
                weights[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
            case "read_weights":
                return {"text": bytes(weights[: arguments[0]].tolist()).decode()}
            case "load_weights":
                page_fd, device = self._weights.page_fd, self._pool.device
                loaded = load_weights(Path(arguments[0]), weights, page_fd, device, SystemClock())
                return {"norm": loaded["norm"].tolist()}
            case "resources":
                return dict(device_resources())
        return {}

    @property
    def _layout(self) -> KvLayout:
        return KvLayout.of(self._pool.geometry(SHAPE))

    def _write_kv(self, block_ids: list[int], num_tokens: int) -> None:
        pool, positions = self._pool.elements(torch.float32), torch.arange(num_tokens, dtype=torch.int32)
        rows = torch.tensor(block_ids, dtype=torch.int32)[positions // SHAPE.block_size]
        for layer in range(SHAPE.num_layers):
            write_kv(pool, self._layout, layer, *random_kv(layer, num_tokens), rows, positions)

    def _attend(self, layer: int, block_ids: list[int], num_tokens: int) -> list[float]:
        plan = AttentionPlan.of(self._layout, NUM_HEADS, 4, (9, 0), num_sms=4)
        q, tables = random_q(layer), torch.tensor([block_ids], dtype=torch.int32)
        out, workspace = torch.empty_like(q), torch.empty(plan.workspace_elements(1, len(block_ids)))
        lengths = torch.tensor([num_tokens], dtype=torch.int32)
        decode_attention(q, self._pool.elements(torch.float32), plan, layer, tables, lengths, out, workspace)
        outputs: list[float] = out.flatten().tolist()
        return outputs


async def serve(path: Path, role: Role) -> None:
    device = open_worker_device(None)
    attachment = await attach(path, role, "m", f"unix:{role}", device)
    own = device.segments.device
    await attachment.prove_share(own.num_sms, own.is_mps_client)

    def on_lost() -> None:
        show(lost=True)
        os._exit(0)

    attachment.on_unit_lost(on_lost)
    attachment.set_ready(True)
    weights_bytes = attachment.weights.memory.numel() if attachment.weights is not None else 0
    show(
        worker=attachment.worker,
        transport=attachment.transport,
        num_sms=[attachment.num_sms, own.num_sms],
        device=own.uuid,
        weights_bytes=weights_bytes,
    )
    worker = Worker(attachment)
    lines: asyncio.Queue[str] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    threading.Thread(target=_read_input, args=(loop, lines), daemon=True).start()
    while True:
        try:
            async with asyncio.timeout(BEAT_EVERY_S):
                line = await lines.get()
        except TimeoutError:
            attachment.beat()
            continue
        show(**worker.run(*json.loads(line)))


def _read_input(loop: asyncio.AbstractEventLoop, lines: asyncio.Queue[str]) -> None:
    for line in sys.stdin:
        loop.call_soon_threadsafe(lines.put_nowait, line)
    os._exit(0)


def main() -> None:
    try:
        asyncio.run(serve(Path(sys.argv[1]), Role(sys.argv[2])))
    except MeshError as error:
        show(error=f"{type(error).__name__}: {error}")
        os._exit(1)  # a detached process is killed after a while


if __name__ == "__main__":
    main()
