"""How matrices are packed for the CPU kernels. Pure arithmetic on shapes and arrays."""

from __future__ import annotations

import numpy as np

PANEL = 48
"""Columns of a panel: three vectors of 16 lanes, or twice three of 8; no real model's sizes waste much of it."""

PARTS = ("input_norm", "qkv", "qkv_bias", "q_norm", "k_norm", "o", "post_norm", "gate_up", "down")
"""Of one layer, in the order in which the kernels number them."""


def padded(count: int, multiple: int) -> int:
    """``count`` rounded up to a multiple."""
    return -(-count // multiple) * multiple


def pack_panels(matrix: np.ndarray) -> np.ndarray:
    """[outputs, depth] → [panels, depth, PANEL], zero where the last panel has no output."""
    outputs, depth = matrix.shape
    panels = padded(outputs, PANEL) // PANEL
    whole = np.zeros((panels * PANEL, depth), dtype=np.float32)
    whole[:outputs] = matrix
    return np.ascontiguousarray(whole.reshape(panels, PANEL, depth).transpose(0, 2, 1))


def pack_gated(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Two [outputs, depth] → panels of half a panel of gate and the same outputs of up."""
    outputs, depth = gate.shape
    half = PANEL // 2
    panels = padded(outputs, half) // half
    whole = np.zeros((2, panels * half, depth), dtype=np.float32)
    whole[0, :outputs], whole[1, :outputs] = gate, up
    return np.ascontiguousarray(whole.reshape(2, panels, half, depth).transpose(1, 3, 0, 2)).reshape(
        panels, depth, PANEL
    )
