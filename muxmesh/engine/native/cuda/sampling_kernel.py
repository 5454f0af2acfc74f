"""Triton kernel that samples one token per row of logits: greedy, or with temperature, top-k, top-p and min-p.

One program samples one row, with the parameters of that row, so that one captured launch serves any mixture of rows. It
reads a greedy row once and a row with a temperature three times. Nothing is sorted: the thresholds of top-k and top-p
are found by bisection over the bits of floats, which are ordered as the floats are, among the few likely tokens of the
row if those suffice, else among all. The rules are those of `muxmesh.engine.token_sampler`, and so are the f32 weights;
sums are f64. Where ``exp`` rounds as NumPy's does, so in Triton's interpreter, the tokens are the same.
"""

# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
"""The most likely tokens that a program keeps in its list, and the tokens that it searches at a time."""
_STREAM = 8192
"""Tokens that it reads at a time for the maximum; half as many for f64 sums, which take more registers.

The more it reads at a time, the more loads are on their way.
"""
_NUM_WARPS = 16

SAMPLED, NOT_FINITE = 0, 1
"""Status of a row. NOT_FINITE: a logit is NaN or +inf, or every logit is -inf; the token is then meaningless."""


def sample_rows(
    logits: Tensor, parameters: Tensor, uniforms: Tensor, tokens: Tensor, statuses: Tensor, likely: Tensor
) -> None:
    """Enqueues the sampling of one token per row. Allocates nothing and waits for nothing: a graph may capture it.

    logits f32 [rows, vocabulary], elements of a row are neighbours; parameters f64 [4, rows]: 1 / temperature (0:
    greedy), top-k (0: off), top-p, min-p; uniforms f64 [rows], in [0, 1). Writes tokens int64 [rows] and statuses
    int64 [rows]. likely int32 [rows, BLOCK] is scratch memory.
    """
    rows, vocab_size = logits.shape
    if not rows:
        return
    assert logits.stride(1) == 1 and parameters.shape == (4, rows)
    assert rows == 1 or parameters.stride(1) == 1, "of one row, neither NumPy nor torch fixes the stride"
    assert likely.shape[0] >= rows and likely.shape[1] == BLOCK and likely.is_contiguous()
    sample_kernel[(rows,)](
        logits, parameters, uniforms, tokens, statuses, likely, logits.stride(0), parameters.stride(0),
        VOCAB=vocab_size, BLOCK=BLOCK, STREAM=_STREAM, num_warps=_NUM_WARPS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["parameter_stride"])
def sample_kernel(
    logits, parameters, uniforms, tokens, statuses, likely, row_stride, parameter_stride,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, STREAM: tl.constexpr,
):  # fmt: skip
    """See `sample_rows`. Grid: (rows,)."""
    row = tl.program_id(0)
    x_at = logits + row.to(tl.int64) * row_stride
    inverse = tl.load(parameters + row).to(tl.float32)
    top, token, is_finite = most_likely(x_at, VOCAB, STREAM)
    if is_finite & (inverse > 0):
        top_k = tl.load(parameters + parameter_stride + row).to(tl.int32)
        top_p = tl.load(parameters + 2 * parameter_stride + row)
        min_p = tl.load(parameters + 3 * parameter_stride + row).to(tl.float32)
        uniform = tl.load(uniforms + row)
        list_at = likely + row.to(tl.int64) * BLOCK
        token = sampled(x_at, list_at, top, inverse, top_k, top_p, min_p, uniform, VOCAB, BLOCK, STREAM)
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(statuses + row, tl.where(is_finite, 0, 1).to(tl.int64))


@triton.jit
def most_likely(x_at, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """Returns the largest logit, the first id of it, and whether it is finite and no logit is NaN."""
    tops = tl.full((BLOCK,), float("-inf"), tl.float32)
    ids = tl.full((BLOCK,), 0, tl.int32)
    is_nan = tl.full((BLOCK,), 0, tl.int32)
    for start in tl.range(0, VOCAB, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(x_at + at, mask=at < VOCAB, other=float("-inf"))
        ids = tl.where(x > tops, at, ids)
        tops = tl.where(x > tops, x, tops)
        is_nan = tl.where(x == x, is_nan, 1)  # noqa: PLR0124
    top = tl.max(tops)
    token = tl.min(tl.where(tops == top, ids, VOCAB))
    is_finite = (tl.max(is_nan) == 0) & (top > float("-inf")) & (top < float("inf"))
    return top, token, is_finite


@triton.jit
def sampled(
    x_at, list_at, top, inverse, top_k, top_p, min_p, uniform,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, STREAM: tl.constexpr,
):  # fmt: skip
    """Returns the id of a token of a row whose largest logit ``top`` is finite."""
    has_top_k = (top_k > 0) & (top_k < VOCAB)
    has_top_p = top_p != 1.0
    total, num_listed = list_likely(x_at, list_at, top, inverse, has_top_k | has_top_p, VOCAB, BLOCK, STREAM // 2)
    in_list = (num_listed <= BLOCK) & ((num_listed >= top_k) | (has_top_k == 0)) & (has_top_k | has_top_p)
    count = tl.where(in_list, num_listed, VOCAB)
    k_floor = tl.full((), -2147483648, tl.int64)  # every key is at least this
    if has_top_k:
        k_floor = kth_largest(x_at, list_at, count, in_list, top_k, top, BLOCK)
        total = weight_sum(x_at, list_at, count, in_list, top, inverse, k_floor, 0, BLOCK)
    p_floor = tl.full((), -1, tl.int64)  # every weight is above this
    last_equal = tl.full((), VOCAB, tl.int32)
    if has_top_p:
        wanted = top_p * total
        reached = weight_sum(x_at, list_at, count, in_list, top, inverse, k_floor, 0, BLOCK)
        in_list = in_list & (reached >= wanted)
        count = tl.where(in_list, count, VOCAB)
        p_floor = nucleus_floor(x_at, list_at, count, in_list, top, inverse, k_floor, wanted, BLOCK)
        last_equal = last_of_equals(x_at, list_at, count, in_list, top, inverse, k_floor, p_floor, wanted, VOCAB, BLOCK)
    return chosen(
        x_at, list_at, count, in_list, top, inverse, k_floor, p_floor, last_equal, min_p,
        total, uniform, has_top_p | (min_p > 0), VOCAB, STREAM // 2,
    )  # fmt: skip


@triton.jit
def list_likely(
    x_at, list_at, top, inverse, wanted, VOCAB: tl.constexpr, BLOCK: tl.constexpr, STREAM: tl.constexpr
):  # fmt: skip
    """Lists the ids, ascending, with at least 1e-4 of the highest probability, if ``wanted``.

    Returns the sum of all weights (f64) and the number of these ids; only the first BLOCK are written.
    """
    sums = tl.full((STREAM,), 0.0, tl.float64)
    least = top - 9.2103404 / inverse
    num_listed = tl.full((), 0, tl.int32)
    for start in tl.range(0, VOCAB, STREAM):
        at = start + tl.arange(0, STREAM)
        x = tl.load(x_at + at, mask=at < VOCAB, other=float("-inf"))
        sums += tl.exp((x - top) * inverse).to(tl.float64)
        if wanted:
            is_likely = (x >= least) & (at < VOCAB)
            index = num_listed + tl.cumsum(is_likely.to(tl.int32)) - 1
            tl.store(list_at + index, at, mask=is_likely & (index < BLOCK))
            num_listed += tl.sum(is_likely.to(tl.int32))
    tl.debug_barrier()  # the list is read by other threads than those that wrote it
    return tl.sum(sums), num_listed


@triton.jit
def candidates(x_at, list_at, start, count, in_list, BLOCK: tl.constexpr):
    """Returns ids and logits [BLOCK] of the candidates from index ``start`` on; -inf past the last."""
    at = start + tl.arange(0, BLOCK)
    ids = tl.where(in_list, tl.load(list_at + at, mask=(at < count) & in_list, other=0), at)
    return ids, tl.load(x_at + ids, mask=at < count, other=float("-inf"))


@triton.jit
def ordered_key(x):
    """Integers in the order of the floats ``x``; 0.0 and -0.0 are equal."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def kth_largest(x_at, list_at, count, in_list, k, top, BLOCK: tl.constexpr):
    """Returns the key of the ``k``-th largest logit of the candidates, which are at least ``k`` (int64)."""
    low = tl.full((), -2147483648, tl.int64)
    high = ordered_key(top).to(tl.int64)
    while low < high:
        middle = (low + high + 1) >> 1
        counts = tl.full((BLOCK,), 0, tl.int32)
        start = 0
        while start < count:
            _, x = candidates(x_at, list_at, start, count, in_list, BLOCK)
            is_counted = (ordered_key(x).to(tl.int64) >= middle) & (start + tl.arange(0, BLOCK) < count)
            counts += is_counted.to(tl.int32)
            start += BLOCK
        enough = tl.sum(counts) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return low


@triton.jit
def kept_weights(x, top, inverse, k_floor):
    """Weights [BLOCK] of logits; 0 below the floor of top-k."""
    weights = tl.exp((x - top) * inverse)
    return tl.where(ordered_key(x).to(tl.int64) >= k_floor, weights, 0.0)


@triton.jit
def weight_sum(x_at, list_at, count, in_list, top, inverse, k_floor, p_floor, BLOCK: tl.constexpr):
    """Returns the sum (f64) of the candidates' weights whose bits are at least ``p_floor``."""
    sums = tl.full((BLOCK,), 0.0, tl.float64)
    start = 0
    while start < count:
        _, x = candidates(x_at, list_at, start, count, in_list, BLOCK)
        weights = kept_weights(x, top, inverse, k_floor)
        is_kept = weights.to(tl.int32, bitcast=True).to(tl.int64) >= p_floor
        sums += tl.where(is_kept, weights, 0.0).to(tl.float64)
        start += BLOCK
    return tl.sum(sums)


@triton.jit
def nucleus_floor(x_at, list_at, count, in_list, top, inverse, k_floor, wanted, BLOCK: tl.constexpr):
    """Returns the bits (int64) of the largest weight such that it and all larger ones sum to ``wanted``."""
    low = tl.full((), 0, tl.int64)
    high = tl.full((), 0x3F800000, tl.int64)  # 1.0, the largest weight
    while low < high:
        middle = (low + high + 1) >> 1
        enough = weight_sum(x_at, list_at, count, in_list, top, inverse, k_floor, middle, BLOCK) >= wanted
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return low


@triton.jit
def last_of_equals(
    x_at, list_at, count, in_list, top, inverse, k_floor, p_floor, wanted, VOCAB: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Returns the last id of those whose weight equals ``p_floor`` that is needed to sum to ``wanted``."""
    above = weight_sum(x_at, list_at, count, in_list, top, inverse, k_floor, p_floor + 1, BLOCK)
    least = p_floor.to(tl.int32).to(tl.float32, bitcast=True).to(tl.float64)
    num_needed = tl.where(
        least > 0, tl.maximum(tl.ceil((wanted - above) / tl.maximum(least, 1e-300)), 1.0), 2.0 * VOCAB
    )
    last = tl.full((), VOCAB, tl.int32)
    num_before = tl.full((), 0, tl.int32)
    start = 0
    while start < count:
        ids, x = candidates(x_at, list_at, start, count, in_list, BLOCK)
        weights = kept_weights(x, top, inverse, k_floor)
        is_equal = (weights.to(tl.int32, bitcast=True).to(tl.int64) == p_floor) & (start + tl.arange(0, BLOCK) < count)
        nth = num_before + tl.cumsum(is_equal.to(tl.int32))
        last = tl.minimum(last, tl.min(tl.where(is_equal & (nth.to(tl.float64) == num_needed), ids, VOCAB)))
        num_before += tl.sum(is_equal.to(tl.int32))
        start += BLOCK
    return last


@triton.jit
def final_weights(ids, x, top, inverse, k_floor, p_floor, last_equal, min_p):
    """Weights (f64) of candidates; 0 for those that a filter excludes."""
    weights = kept_weights(x, top, inverse, k_floor)
    bits = weights.to(tl.int32, bitcast=True).to(tl.int64)
    is_kept = ((bits > p_floor) | ((bits == p_floor) & (ids <= last_equal))) & (weights >= min_p)
    return tl.where(is_kept, weights, 0.0).to(tl.float64)


@triton.jit
def chosen(
    x_at, list_at, count, in_list, top, inverse, k_floor, p_floor, last_equal, min_p,
    total, uniform, is_partial, VOCAB: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Returns the first id at which the running sum of weights exceeds ``uniform`` of their total.

    ``total`` is their total unless ``is_partial``. Where rounding leaves no such id, returns the last with a weight.
    """
    if is_partial:
        sums = tl.full((BLOCK,), 0.0, tl.float64)
        start = 0
        while start < count:
            ids, x = candidates(x_at, list_at, start, count, in_list, BLOCK)
            sums += final_weights(ids, x, top, inverse, k_floor, p_floor, last_equal, min_p)
            start += BLOCK
        total = tl.sum(sums)
    target = uniform * total
    running = tl.full((), 0.0, tl.float64)
    token = tl.full((), VOCAB, tl.int32)
    last = tl.full((), 0, tl.int32)
    start = 0
    while (start < count) & (token == VOCAB):
        ids, x = candidates(x_at, list_at, start, count, in_list, BLOCK)
        weights = final_weights(ids, x, top, inverse, k_floor, p_floor, last_equal, min_p)
        sums = running + tl.cumsum(weights)
        token = tl.min(tl.where((sums > target) & (weights > 0), ids, VOCAB))
        last = tl.maximum(last, tl.max(tl.where(weights > 0, ids, 0)))
        running += tl.sum(weights)
        start += BLOCK
    return tl.where(token == VOCAB, last, token)
