"""Intrinsics that numba cannot express: register tiles of matrix products, vectors of f32, and atomic counters.

They emit LLVM IR. Addresses are int64 and count bytes; strides and depths count f32 elements. Knows nothing of models,
packed weights or the layout of KV.
"""

# mypy: disable-error-code="call-arg, misc, no-untyped-call"
from __future__ import annotations

import functools
import platform
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_FLOAT = ir.FloatType()
_INT32 = ir.IntType(32)
_INT64 = ir.IntType(64)
_BYTES = ir.IntType(8).as_pointer()
_UNROLL = 4
_LOG2_E = 1.4426950408889634
_LN_2 = 0.6931471805599453


def _vector_unit() -> tuple[int, int]:
    """Returns the f32 lanes of a register, and the most rows of a tile whose accumulators all stay in registers."""
    try:
        features = llvmlite.binding.get_host_cpu_features()
    except RuntimeError:
        features = {}
    if features.get("avx512f"):
        return 16, 8
    if features.get("avx2"):
        return 8, 4
    return 4, 8 if platform.machine() in ("aarch64", "arm64") else 4


LANES, TILE_ROWS = _vector_unit()
TILE_VECTORS = 3
"""Vectors of weights in one tile: 8 x 3 accumulators in 32 registers, or 4 x 3 in 16."""


def _const(value: int) -> Any:
    return ir.Constant(_INT64, value)


def _splat(builder: Any, scalar: Any, vector: Any) -> Any:
    """A vector with ``scalar`` in every lane."""
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(_INT32, 0))
    return builder.shuffle_vector(
        first, undefined, ir.Constant(ir.VectorType(_INT32, vector.count), [0] * vector.count)
    )


class _Tile:
    """Emits one tile: ``rows * vectors`` accumulators in registers and a loop along the depth."""

    def __init__(self, builder: Any, rows: int, vectors: int, lanes: int, prefetch: Any) -> None:
        """``prefetch``: elements ahead of each vector of weights, or None."""
        self.b, self.rows, self.vectors, self.prefetch = builder, rows, vectors, prefetch
        self.vector = ir.VectorType(_FLOAT, lanes)
        fma = ir.FunctionType(self.vector, [self.vector] * 3)
        self.fma = cgutils.get_or_insert_function(builder.module, fma, f"llvm.fma.v{lanes}f32")
        hint = ir.FunctionType(ir.VoidType(), [_BYTES, _INT32, _INT32, _INT32])
        self.hint = cgutils.get_or_insert_function(builder.module, hint, "llvm.prefetch.p0")

    def load(self, pointer: Any) -> Any:
        value = self.b.load(self.b.bitcast(pointer, self.vector.as_pointer()))
        value.align = 4
        return value

    def store(self, value: Any, pointer: Any) -> None:
        self.b.store(value, self.b.bitcast(pointer, self.vector.as_pointer())).align = 4

    def splat(self, scalar: Any) -> Any:
        return _splat(self.b, scalar, self.vector)

    def address(self, pointer: Any, *offsets: Any) -> Any:
        for offset in offsets:
            pointer = self.b.gep(pointer, [offset])
        return pointer

    def step(self, sums: list[Any], x_rows: list[Any], w_vectors: list[Any], k: Any) -> list[Any]:
        """Adds the products at depth ``k``: one fused multiply-add for each sum, in a tile of any size."""
        loaded = [self.load(pointer) for pointer in w_vectors]
        if self.prefetch is not None:
            for pointer in w_vectors:
                ahead = self.b.bitcast(self.address(pointer, self.prefetch), _BYTES)
                self.b.call(self.hint, [ahead, *(ir.Constant(_INT32, value) for value in (0, 3, 1))])
        results: list[Any] = []
        for row in x_rows:  # one row at a time: with all of x in registers, sums would spill
            x = self.splat(self.b.load(self.address(row, k)))
            for weight in loaded:
                results.append(self.b.call(self.fma, [x, weight, sums[len(results)]]))
        return results

    def loop(self, sums: list[Any], start: Any, end: Any, unroll: int, body: Any) -> tuple[list[Any], Any]:
        """Emits ``for k in range(start, end, unroll)``; returns the sums and the k after the loop."""
        b, before = self.b, self.b.block
        inside, after = b.append_basic_block("depth"), b.append_basic_block("depth.end")
        b.cbranch(b.icmp_signed("<", start, end), inside, after)
        b.position_at_end(inside)
        k = b.phi(_INT64)
        k.add_incoming(start, before)
        carried = [b.phi(self.vector) for _ in sums]
        current = list(carried)
        for unrolled in range(unroll):
            current = body(current, b.add(k, _const(unrolled)))
        following = b.add(k, _const(unroll))
        k.add_incoming(following, inside)
        for phi, first, last in zip(carried, sums, current, strict=True):
            phi.add_incoming(first, before)
            phi.add_incoming(last, inside)
        b.cbranch(b.icmp_signed("<", following, end), inside, after)
        b.position_at_end(after)
        results = []
        for first, last in zip([start, *sums], [following, *current], strict=True):
            phi = b.phi(first.type)
            phi.add_incoming(first, before)
            phi.add_incoming(last, inside)
            results.append(phi)
        return results[1:], results[0]

    def emit(self, x: Any, x_stride: Any, vectors_at: Any, depth: Any, out: Any, out_stride: Any, adds: bool) -> None:
        """Emits the tile. ``vectors_at(k)`` returns the addresses of the weights at depth ``k``."""
        b = self.b
        x, out = (b.inttoptr(address, _FLOAT.as_pointer()) for address in (x, out))
        x_rows = [self.address(x, b.mul(x_stride, _const(row))) for row in range(self.rows)]
        out_vectors = [
            self.address(out, b.mul(out_stride, _const(row)), _const(vector * self.vector.count))
            for row in range(self.rows)
            for vector in range(self.vectors)
        ]
        zero = ir.Constant(self.vector, [0.0] * self.vector.count)
        sums = [self.load(pointer) if adds else zero for pointer in out_vectors]

        def body(sums: list[Any], k: Any) -> list[Any]:
            return self.step(sums, x_rows, vectors_at(k), k)

        whole = b.and_(depth, _const(-_UNROLL))
        sums, done = self.loop(sums, _const(0), whole, _UNROLL, body)
        sums, _ = self.loop(sums, done, depth, 1, body)
        for value, pointer in zip(sums, out_vectors, strict=True):
            self.store(value, pointer)


def _ahead(prefetch: Any, value: Any) -> Any:
    """The prefetch distance of a tile as IR: None, a constant, or a value at run time."""
    if isinstance(prefetch, types.IntegerLiteral):
        return _const(prefetch.literal_value) if prefetch.literal_value else None
    return value


@intrinsic(prefer_literal=True)
def multiply_tile(  # type: ignore[no-untyped-def]
    typingctx, rows, vectors, lanes, adds, prefetch, x, x_stride, w, k_stride, v_stride, depth, out, out_stride
):
    """``out[r, v * lanes + l] = sum over k of x[r, k] * w[k, v, l]``, plus the previous ``out`` if ``adds`` is 1.

    The first four arguments are literals: rows and vectors of the tile, f32 lanes of a vector, and ``adds``.
    ``prefetch``: distance in elements ahead of each vector, or the literal 0 for none. The address of w[k, v] is
    ``w + 4 * (k * k_stride + v * v_stride)``. Each sum runs along k in order in one accumulator, so a row's result has
    the same bits in a tile of any size.
    """
    literals = [argument.literal_value for argument in (rows, vectors, lanes, adds)]
    signature = types.void(rows, vectors, lanes, adds, prefetch, *[types.int64] * 8)

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        num_rows, num_vectors, num_lanes, accumulates = literals
        tile = _Tile(builder, num_rows, num_vectors, num_lanes, _ahead(prefetch, arguments[4]))
        x, x_stride, w, k_stride, v_stride, depth, out, out_stride = arguments[5:]
        w = builder.inttoptr(w, _FLOAT.as_pointer())

        def vectors_at(k):  # type: ignore[no-untyped-def]
            w_k = tile.address(w, builder.mul(k, k_stride))
            return [tile.address(w_k, builder.mul(_const(v), v_stride)) for v in range(num_vectors)]

        tile.emit(x, x_stride, vectors_at, depth, out, out_stride, bool(accumulates))
        return context.get_dummy_value()

    return signature, codegen


@intrinsic(prefer_literal=True)
def multiply_scattered(  # type: ignore[no-untyped-def]
    typingctx, rows, lanes, prefetch, x, x_stride, w0, w1, w2, w3, k_stride, depth, out, out_stride
):
    """As `multiply_tile` without ``adds``, for four vectors of weights with an address each.

    The address of w[k, v] is ``wv + 4 * k * k_stride``. The first two arguments are literals.
    """
    num_rows, num_lanes = rows.literal_value, lanes.literal_value
    signature = types.void(rows, lanes, prefetch, *[types.int64] * 10)

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        tile = _Tile(builder, num_rows, 4, num_lanes, _ahead(prefetch, arguments[2]))
        x, x_stride, *bases, k_stride, depth, out, out_stride = arguments[3:]
        vectors = [builder.inttoptr(base, _FLOAT.as_pointer()) for base in bases]

        def vectors_at(k):  # type: ignore[no-untyped-def]
            return [tile.address(vector, builder.mul(k, k_stride)) for vector in vectors]

        tile.emit(x, x_stride, vectors_at, depth, out, out_stride, False)
        return context.get_dummy_value()

    return signature, codegen


class _Span:
    """Emits vector code over ``count`` f32 at one address, in vectors of ``lanes``."""

    def __init__(self, builder: Any, address: Any, count: int, lanes: int = LANES) -> None:
        self.b, self.lanes = builder, lanes
        self.vector = ir.VectorType(_FLOAT, lanes)
        base = builder.inttoptr(address, _FLOAT.as_pointer())
        firsts = [builder.gep(base, [_const(index)]) for index in range(0, count, lanes)]
        self.pointers = [builder.bitcast(first, self.vector.as_pointer()) for first in firsts]

    def load(self) -> list[Any]:
        values = [self.b.load(pointer) for pointer in self.pointers]
        for value in values:
            value.align = 4
        return values

    def store(self, values: list[Any]) -> None:
        for value, pointer in zip(values, self.pointers, strict=True):
            self.b.store(value, pointer).align = 4

    def const(self, value: float) -> Any:
        return ir.Constant(self.vector, [ir.Constant(_FLOAT, value)] * self.lanes)

    def call(self, name: str, *arguments: Any) -> Any:
        function = ir.FunctionType(self.vector, [argument.type for argument in arguments])
        name = f"llvm.{name}.v{self.lanes}f32"
        return self.b.call(cgutils.get_or_insert_function(self.b.module, function, name), arguments)

    def reduce(self, name: str, value: Any, *start: Any) -> Any:
        function = ir.FunctionType(_FLOAT, [*(first.type for first in start), self.vector])
        name = f"llvm.vector.reduce.{name}.v{self.lanes}f32"
        callee = cgutils.get_or_insert_function(self.b.module, function, name)
        return self.b.call(callee, [*start, value], fastmath=("nnan", "nsz", "reassoc"))

    def first(self, count: Any, values: list[Any], otherwise: Any) -> list[Any]:
        """``values`` with every element from index ``count`` on replaced by ``otherwise``."""
        lanes = ir.VectorType(_INT32, self.lanes)
        limit = _splat(self.b, self.b.trunc(count, _INT32), lanes)
        chosen = []
        for start, value in zip(range(0, len(values) * self.lanes, self.lanes), values, strict=True):
            indices = ir.Constant(lanes, list(range(start, start + self.lanes)))
            chosen.append(self.b.select(self.b.icmp_signed("<", indices, limit), value, otherwise))
        return chosen

    def larger(self, a: Any, b: Any) -> Any:
        return self.b.select(self.b.fcmp_ordered(">", a, b), a, b)

    def smaller(self, a: Any, b: Any) -> Any:
        return self.b.select(self.b.fcmp_ordered("<", a, b), a, b)

    def exp(self, x: Any) -> Any:
        """e**x = 2**y with y = x * log2(e) clamped to [-126, 126], y = n + r and n the nearest integer.

        2**r is a Taylor polynomial for |r * ln 2| <= 0.35 (relative error 2e-7); n is added to the exponent bits.
        """
        b, integers = self.b, ir.VectorType(_INT32, self.lanes)
        y = self.larger(b.fmul(x, self.const(_LOG2_E)), self.const(-126.0))
        y = self.smaller(y, self.const(126.0))
        n = self.call("rint", y)
        z = b.fmul(b.fsub(y, n), self.const(_LN_2))
        power = self.const(1 / 720)
        for coefficient in (1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0):
            power = self.call("fma", power, z, self.const(coefficient))
        shift = b.shl(b.fptosi(n, integers), ir.Constant(integers, [23] * self.lanes))
        return b.bitcast(b.add(b.bitcast(power, integers), shift), self.vector)


@intrinsic(prefer_literal=True)
def span_max(typingctx, count, address, visible):  # type: ignore[no-untyped-def]
    """Returns the largest of the first ``visible`` of ``count`` f32, at least -1e30.

    count: a literal multiple of `LANES`.
    """
    length = count.literal_value

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        span = _Span(builder, arguments[1], length)
        values = span.first(arguments[2], span.load(), span.const(-1e30))
        return span.reduce("fmax", functools.reduce(span.larger, values))

    return types.float32(count, types.int64, types.int64), codegen


@intrinsic(prefer_literal=True)
def span_exp(typingctx, count, address, visible, top):  # type: ignore[no-untyped-def]
    """Replaces the first ``visible`` of ``count`` f32 by ``exp(x - top)``, the others by 0; returns the sum.

    Needs x <= top. count: a literal multiple of `LANES`.
    """
    length = count.literal_value

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        span = _Span(builder, arguments[1], length)
        top = _splat(builder, arguments[3], span.vector)
        results = [span.exp(builder.fsub(value, top)) for value in span.load()]
        results = span.first(arguments[2], results, span.const(0.0))
        span.store(results)
        return span.reduce("fadd", functools.reduce(builder.fadd, results), ir.Constant(_FLOAT, -0.0))

    return types.float32(count, types.int64, types.int64, types.float32), codegen


@intrinsic(prefer_literal=True)
def span_silu(typingctx, count, gate, up, out):  # type: ignore[no-untyped-def]
    """``out = silu(gate) * up`` over ``count`` f32, where silu(x) = x / (1 + exp(-x)).

    count: a literal multiple of 8.
    """
    length = count.literal_value

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        gate, up, out = (_Span(builder, address, length, lanes=8) for address in arguments[1:])
        results = []
        for x, factor in zip(gate.load(), up.load(), strict=True):
            denominator = builder.fadd(gate.exp(builder.fsub(gate.const(-0.0), x)), gate.const(1.0))
            results.append(builder.fmul(builder.fdiv(x, denominator), factor))
        out.store(results)
        return context.get_dummy_value()

    return types.void(count, types.int64, types.int64, types.int64), codegen


@intrinsic
def fetch_add(typingctx, address, value):  # type: ignore[no-untyped-def]
    """Atomically adds to the int64 at ``address`` and returns its previous value; acquires and releases."""

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        pointer = builder.inttoptr(arguments[0], _INT64.as_pointer())
        return builder.atomic_rmw("add", pointer, arguments[1], "acq_rel")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def load_acquire(typingctx, address):  # type: ignore[no-untyped-def]
    """Loads the int64 at ``address``. Stores before a `fetch_add` to it are visible after the load."""

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.load_atomic(builder.inttoptr(arguments[0], _INT64.as_pointer()), "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def pause(typingctx):  # type: ignore[no-untyped-def]
    """Hints to the core that this thread spins: `pause` on x86, nothing elsewhere."""

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        if platform.machine() in ("x86_64", "AMD64"):
            function = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, function, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def yield_cpu(typingctx):  # type: ignore[no-untyped-def]
    """Yields the core to another thread: ``sched_yield()``."""

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        function = ir.FunctionType(_INT32, [])
        builder.call(cgutils.get_or_insert_function(builder.module, function, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), codegen
