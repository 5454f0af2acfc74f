"""Matrix products of activations and packed weights. A panel is contiguous: [depth, PANEL], `PANEL` output columns.

The loop nest is that of Goto and van de Geijn ("Anatomy of High-Performance Matrix Multiplication", 2008), without the
packing of activations: for each block of rows, a panel streams once through the L2 cache. A task of a phase is one
panel and one block of rows. Each sum runs along the depth in order, so a row's result does not depend on other rows.
"""

# mypy: disable-error-code="call-arg, misc, no-untyped-call"
from __future__ import annotations

import numba
import numpy as np

from muxmesh.engine.native.cpu.thread_team import JIT, claim, claim_next, wait
from muxmesh.engine.native.cpu.vector import LANES, TILE_ROWS, TILE_VECTORS, multiply_tile, span_silu
from muxmesh.models.matrix_packing import PANEL

ROW_BLOCK = 96
"""Rows of one task; their activations stay in the cache while a panel streams."""
_SUB_PANEL = LANES * TILE_VECTORS
_PREFETCH = 256
"""Distance of the prefetch in elements of a panel."""
_HALF = PANEL // 2

assert PANEL % _SUB_PANEL == 0


@numba.njit(**JIT)
def multiply_panel(x, x_stride, panel, depth, out, out_stride, num_rows):  # type: ignore[no-untyped-def]
    """``out[rows, PANEL] = x[rows, depth] @ panel``. x, panel and out are addresses; strides count elements."""
    for column in range(0, PANEL, _SUB_PANEL):
        row, w = 0, panel + 4 * column
        while row < num_rows:
            a, b = x + 4 * row * x_stride, out + 4 * (row * out_stride + column)
            left = num_rows - row
            if TILE_ROWS == 8 and left >= 8:
                multiply_tile(8, TILE_VECTORS, LANES, 0, _PREFETCH, a, x_stride, w, PANEL, LANES, depth, b, out_stride)
                row += 8
            elif left >= 4:
                multiply_tile(4, TILE_VECTORS, LANES, 0, _PREFETCH, a, x_stride, w, PANEL, LANES, depth, b, out_stride)
                row += 4
            elif left >= 2:
                multiply_tile(2, TILE_VECTORS, LANES, 0, _PREFETCH, a, x_stride, w, PANEL, LANES, depth, b, out_stride)
                row += 2
            else:
                multiply_tile(1, TILE_VECTORS, LANES, 0, _PREFETCH, a, x_stride, w, PANEL, LANES, depth, b, out_stride)
                row += 1


@numba.njit(**JIT)
def multiply(counters, phase, x, weights, depth, num_columns, out):  # type: ignore[no-untyped-def]
    """``out = x @ weights``.

    x [rows, at least depth]. weights: address of the panels. out [rows, at least the columns of all panels].
    """
    rows = x.shape[0]
    panels = (num_columns + PANEL - 1) // PANEL
    tasks = panels * ((rows + ROW_BLOCK - 1) // ROW_BLOCK)
    x_stride, out_stride = x.strides[0] // 4, out.strides[0] // 4
    task = claim(counters, phase)
    while task < tasks:
        first, panel = task // panels * ROW_BLOCK, task % panels
        multiply_panel(
            x.ctypes.data + 4 * first * x_stride,
            x_stride,
            weights + 4 * panel * depth * PANEL,
            depth,
            out.ctypes.data + 4 * (first * out_stride + panel * PANEL),
            out_stride,
            min(ROW_BLOCK, rows - first),
        )
        task = claim_next(counters, phase)
    wait(counters, phase, tasks)


@numba.njit(**JIT)
def multiply_add(counters, phase, x, weights, depth, num_columns, out):  # type: ignore[no-untyped-def]
    """``out += x @ weights``, the residual connection. Arguments as in `multiply`."""
    rows = x.shape[0]
    panels = (num_columns + PANEL - 1) // PANEL
    tasks = panels * ((rows + ROW_BLOCK - 1) // ROW_BLOCK)
    x_stride = x.strides[0] // 4
    product = np.empty((ROW_BLOCK, PANEL), dtype=np.float32)
    task = claim(counters, phase)
    while task < tasks:
        first, panel = task // panels * ROW_BLOCK, task % panels
        count = min(ROW_BLOCK, rows - first)
        a, w = x.ctypes.data + 4 * first * x_stride, weights + 4 * panel * depth * PANEL
        multiply_panel(a, x_stride, w, depth, product.ctypes.data, PANEL, count)
        for row in range(count):
            for column in range(PANEL):
                out[first + row, panel * PANEL + column] += product[row, column]
        task = claim_next(counters, phase)
    wait(counters, phase, tasks)


@numba.njit(**JIT)
def multiply_gated(counters, phase, x, weights, depth, num_columns, out):  # type: ignore[no-untyped-def]
    """``out = silu(x @ gate) * (x @ up)`` for weights packed by `pack_gated`, with ``num_columns`` outputs."""
    rows = x.shape[0]
    panels = (num_columns + _HALF - 1) // _HALF
    tasks = panels * ((rows + ROW_BLOCK - 1) // ROW_BLOCK)
    x_stride, out_stride = x.strides[0] // 4, out.strides[0] // 4
    product = np.empty((ROW_BLOCK, PANEL), dtype=np.float32)
    task = claim(counters, phase)
    while task < tasks:
        first, panel = task // panels * ROW_BLOCK, task % panels
        count = min(ROW_BLOCK, rows - first)
        a, w = x.ctypes.data + 4 * first * x_stride, weights + 4 * panel * depth * PANEL
        multiply_panel(a, x_stride, w, depth, product.ctypes.data, PANEL, count)
        for row in range(count):
            gate = product.ctypes.data + 4 * row * PANEL
            span_silu(_HALF, gate, gate + 4 * _HALF, out.ctypes.data + 4 * ((first + row) * out_stride + panel * _HALF))
        task = claim_next(counters, phase)
    wait(counters, phase, tasks)
