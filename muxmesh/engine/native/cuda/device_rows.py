"""The rows of a step as tensors on the device, and their upload: one transfer for everything of a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from muxmesh.device.torch_device import TorchDevice
from muxmesh.engine.native.cuda.step_rows import StepRows, pack


@dataclass(frozen=True, slots=True)
class DeviceRows:
    """The rows of a step on the device: first ``num_decodes`` rows of one sequence each, then the rows of chunks.

    token_ids, positions, block_ids int32 [rows]: each token, its position in its sequence, and the token block that
    stores its KV; -1 for a padding row, which writes nothing. tables int32 [sequences, blocks of the longest possible
    sequence]: token blocks of each sequence, those of the decode rows first, anything past its last block.
    context_lens int32 [num_decodes]: tokens of each sequence including the new one, 0 for a padding row. tiles: see
    `attention_plan.prefill_tiles`; None without chunks.
    """

    token_ids: Tensor
    positions: Tensor
    block_ids: Tensor
    tables: Tensor
    num_decodes: int
    context_lens: Tensor
    tiles: Tensor | None


def upload(device: TorchDevice, arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Uploads arrays of 4 or 8 bytes per element in one transfer: enqueued, not waited for. Returns them by name."""
    packed, parts = pack(arrays)
    uploaded = device.upload(packed)
    return {name: uploaded[parts[name]].view(_torch_dtype(array)).view(array.shape) for name, array in arrays.items()}


def _torch_dtype(array: np.ndarray) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype=array.dtype)).dtype


def device_rows(rows: StepRows, uploaded: Mapping[str, Tensor], tables: Tensor) -> DeviceRows:
    """Returns the uploaded rows. Copies their tables into ``tables``, whose width decides how contexts are split.

    Blocks beyond this width are those of no position of the model.
    """
    given = uploaded["tables"][:, : tables.shape[1]]
    tables[: given.shape[0], : given.shape[1]].copy_(given)
    return DeviceRows(
        token_ids=uploaded["token_ids"],
        positions=uploaded["positions"],
        block_ids=uploaded["block_ids"],
        tables=tables,
        num_decodes=rows.num_decodes,
        context_lens=uploaded["context_lens"],
        tiles=uploaded["tiles"] if len(uploaded["tiles"]) else None,
    )
