"""A tiny model on the device of the tests of kernels: its forward pass over a pool that begins with NaN everywhere."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from muxmesh.clock import SystemClock
from muxmesh.device.kv_view import KvGeometry
from muxmesh.device.torch_device import TorchDevice
from muxmesh.engine.native.cuda.attention_plan import AttentionPlan
from muxmesh.engine.native.cuda.device_rows import device_rows, upload
from muxmesh.engine.native.cuda.forward import DeviceForward
from muxmesh.engine.native.cuda.kv_layout import KvLayout
from muxmesh.engine.native.cuda.runner import CudaRunner, RunnerLimits
from muxmesh.engine.native.cuda.step_rows import arrange, decode_buckets
from muxmesh.engine.step import Chunk
from muxmesh.models.model_spec import ModelSpec, read_model_spec
from muxmesh.models.weight_image import ensure_image, map_image
from muxmesh.types import blocks_for

MAX_NUM_SEQS = 4


def image_weights(folder: Path, spec: ModelSpec, cache: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a model by their names in an image, in ``dtype``, in host memory."""
    image = map_image(ensure_image(folder, spec, "rows", cache, lambda done, total: None))
    return {name: torch.from_numpy(image.get(name)).to(dtype) for name in image.parts}


def tiny_geometry(spec: ModelSpec, dtype: torch.dtype, block_size: int = 16) -> KvGeometry:
    """Slabs of four token blocks and 64 bytes that belong to none."""
    shape = spec.kv_shape(block_size, str(dtype).removeprefix("torch."))
    return KvGeometry(shape, 4 * shape.token_block_bytes + 64)


def nan_pool(geometry: KvGeometry, num_slabs: int, dtype: torch.dtype) -> Tensor:
    """The bytes of a pool (uint8) whose elements of ``dtype`` are NaN, so that a read of unwritten KV shows."""
    elements = num_slabs * geometry.slab_bytes // dtype.itemsize
    return torch.full((elements,), torch.nan, dtype=dtype).view(torch.uint8)


class ForwardCase:
    """The forward pass of the model in ``folder`` with weights in ``dtype`` and KV in ``kv_dtype``."""

    def __init__(
        self,
        folder: Path,
        cache: Path,
        device: TorchDevice,
        dtype: torch.dtype = torch.float32,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        spec, kv_dtype = read_model_spec(folder), kv_dtype or dtype
        geometry = tiny_geometry(spec, kv_dtype)
        self._device = device
        self._vocab_size = spec.vocab_size
        self._plan = AttentionPlan.of(
            KvLayout.of(geometry), spec.num_heads, dtype.itemsize, device.compute_capability, device.num_sms
        )
        self._buckets = decode_buckets(MAX_NUM_SEQS)
        max_blocks = blocks_for(spec.context_len, geometry.shape.block_size)
        self._tables = torch.zeros(2 * MAX_NUM_SEQS, max_blocks, dtype=torch.int32, device=device.torch_device)
        elements = max(self._plan.workspace_elements(size, max_blocks) for size in self._buckets)
        weights = image_weights(folder, spec, cache, dtype)
        self.forward = DeviceForward(
            spec,
            {name: tensor.to(device.torch_device) for name, tensor in weights.items()},
            nan_pool(geometry, 8, kv_dtype).to(device.torch_device).view(kv_dtype),
            self._plan,
            spec.context_len,
            torch.full((elements,), torch.nan, device=device.torch_device),
        )

    @torch.inference_mode()
    def logits(self, *chunks: Chunk) -> dict[int, Tensor]:
        """Computes a step. Returns the logits of each job on the host, f32 [rows with logits, vocab_size]."""
        rows = arrange(chunks, self._buckets, self._plan)
        uploaded = upload(self._device, rows.arrays)
        hidden = self.forward.hidden(device_rows(rows, uploaded, self._tables))
        last = hidden.index_select(0, uploaded["logit_rows"])
        logits = torch.empty((len(last), self._vocab_size), device=hidden.device)
        self.forward.logits(last, logits)
        parts = torch.split(logits.cpu(), [chunk.num_logit_rows for chunk in rows.chunks])
        return {chunk.job_id: part for chunk, part in zip(rows.chunks, parts, strict=True)}


def device_runner(
    folder: Path,
    cache: Path,
    device: TorchDevice,
    dtype: torch.dtype = torch.float32,
    use_graphs: bool = True,
    max_steps: int = 4,
    pool: Tensor | None = None,
    weights: dict[str, Tensor] | None = None,
    block_size: int = 16,
) -> CudaRunner:
    """A loaded runner of the model in ``folder``, or of ``weights``, over ``pool`` (uint8) or 8 slabs that are NaN."""
    spec = read_model_spec(folder)
    geometry = tiny_geometry(spec, dtype, block_size)
    limits = RunnerLimits(MAX_NUM_SEQS, step_token_budget=32, max_model_len=64, max_steps=max_steps, max_logit_rows=4)
    pool = nan_pool(geometry, 8, dtype).to(device.torch_device) if pool is None else pool
    on_host = weights or image_weights(folder, spec, cache, dtype)
    opened = {name: tensor.to(device.torch_device) for name, tensor in on_host.items()}
    runner = CudaRunner(
        device, spec, lambda: opened, geometry, pool.view(dtype), limits, SystemClock(), use_graphs=use_graphs
    )
    runner.load()
    return runner
