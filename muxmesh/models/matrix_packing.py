"""Packed layouts of weight matrices for the CPU kernels. Pure arithmetic on shapes and arrays."""

from __future__ import annotations

import numpy as np

PANEL = 48
"""Output columns of one panel: 3 vectors of 16 f32 lanes, or 6 of 8. At real model sizes the padding is small."""

PARTS = ("input_norm", "qkv", "qkv_bias", "q_norm", "k_norm", "o", "post_norm", "gate_up", "down")
"""Tensors of one layer, in the order in which the kernels index them."""


def padded(count: int, multiple: int) -> int:
    """``count`` rounded up to a multiple of ``multiple``."""
    return -(-count // multiple) * multiple


def pack_panels(matrix: np.ndarray) -> np.ndarray:
    """Packs [outputs, depth] as [panels, depth, PANEL], f32. Missing outputs of the last panel are zero."""
    outputs, depth = matrix.shape
    panels = padded(outputs, PANEL) // PANEL
    whole = np.zeros((panels * PANEL, depth), dtype=np.float32)
    whole[:outputs] = matrix
    return np.ascontiguousarray(whole.reshape(panels, PANEL, depth).transpose(0, 2, 1))


def pack_gated(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Packs two matrices [outputs, depth] as [panels, depth, PANEL], f32.

    The first half of each panel holds outputs of ``gate``, the second half the same outputs of ``up``. So one panel
    gives both factors of the gated activation.
    """
    outputs, depth = gate.shape
    half = PANEL // 2
    panels = padded(outputs, half) // half
    whole = np.zeros((2, panels * half, depth), dtype=np.float32)
    whole[0, :outputs], whole[1, :outputs] = gate, up
    return np.ascontiguousarray(whole.reshape(2, panels, half, depth).transpose(1, 3, 0, 2)).reshape(
        panels, depth, PANEL
    )
