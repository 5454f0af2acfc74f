"""From prompt features to a standardised log length: kernel ridge regression, the mean of a Gaussian process.

The kernel is the mean of two Gaussian kernels, one twice as wide as the other, over the concatenation of the scaled
lexical features and the word vector (Rasmussen and Williams 2006, chapter 2). On a few thousand prompts it ranks better
than boosted trees on the same features, and needs fewer prompts. The inverse of the kernel matrix gives the
leave-one-out residuals (chapter 5.4.2), so a fit is compared with the one before it on prompts that neither has seen.
All values are in units of standardised log length.

Inner products are taken along the principal components of the prompts, since reading the rows is a large part of the
time of a prediction. The rest of a prompt counts as orthogonal to that of every other prompt: it only adds to their
distance. The kernel stays positive definite: it is that of the projections, times a factor of at most 1 for each
prompt, plus a non-negative diagonal that restores the 1 of each prompt with itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from muxmesh.predictor.prompt_features import PromptFeatures, Vector

Matrix = npt.NDArray[np.float32]
TenantIds = npt.NDArray[np.uint64]

_LEXICAL_SCALE = 7.0
_WORDS_SCALE = 0.85
_GAMMA = 0.3
_MAX_DIRECTIONS = 128
"""Of 228. All of them rank better by 0.002 in Kendall's tau, and a prediction takes a seventh longer."""
_PROMPT_NOISE = 0.1
"""Variance between prompts with equal features; it does not shrink with the number of outputs."""
_OUTPUT_NOISE = 0.1
"""Variance between outputs of one prompt."""
_MIN_SPREAD = 0.2
_NEARLY_EQUAL = 0.9
"""Kernel of prompts with equal lexical features whose word vectors have a cosine of 0.9."""


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """A fitted regression, on n examples and k directions of d features. All arrays are float32.

    ``mean`` and ``scale`` standardise the lexical features. ``directions`` [d, k] are the principal components,
    ``rows`` [n, k] the examples along them, ``squares`` [n] the squared norms of the whole examples, ``weights`` [n, 2]
    those of the mean and of the spread, ``tenant_ids`` uint64 [n] whose the examples are.
    """

    mean: Vector
    scale: Vector
    directions: Matrix
    rows: Matrix
    squares: Vector
    weights: Matrix
    tenant_ids: TenantIds
    mean_spread: float

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The values by name, as arrays. They do not change."""
        return {one.name: np.asarray(getattr(self, one.name)) for one in fields(self)}

    @staticmethod
    def from_arrays(arrays: Mapping[str, npt.NDArray[Any]], num_features: int) -> Fit:
        """The fit of `arrays`, for prompts with ``num_features`` features in all.

        Raises ValueError or KeyError if they are no such arrays.
        """
        values: dict[str, Any] = {one.name: arrays[one.name] for one in fields(Fit)}
        fitted = Fit(**values | {"mean_spread": float(values["mean_spread"])})
        (num_rows, num_directions), num_lexical = fitted.rows.shape, len(fitted.mean)
        expected = {
            "mean": (num_lexical,),
            "scale": (num_lexical,),
            "directions": (num_features, num_directions),
            "rows": (num_rows, num_directions),
            "squares": (num_rows,),
            "weights": (num_rows, 2),
            "tenant_ids": (num_rows,),
            "mean_spread": (),
        }
        if {name: array.shape for name, array in values.items()} != expected:
            raise ValueError("the arrays of the fit do not belong together")
        if not all(np.isfinite(array).all() for array in values.values()):
            raise ValueError("the fit is not finite")
        return fitted

    def predict(self, features: PromptFeatures, tenant_id: int | None = None) -> tuple[float, float]:
        """Mean and spread (mean absolute error) of the standardised log length.

        With a ``tenant_id``, without the terms of nearly equal prompts of other tenants: at such a prompt the kernel
        nearly reproduces its length.
        """
        row = _feature_rows(features.lexical, features.words, self.mean, self.scale)
        kernel = _kernel(self.rows @ (row @ self.directions), self.squares, row @ row)
        if tenant_id is not None:
            kernel[(kernel > _NEARLY_EQUAL) & (self.tenant_ids != tenant_id)] = 0
        mean, more_spread = (kernel @ self.weights).tolist()
        return mean, max(_MIN_SPREAD, self.mean_spread + more_spread)


@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """What a fit learns from, one row for each prompt.

    ``lexical`` float32 [n, features], ``words`` float32 [n, WORD_DIM]. ``targets`` float32 [n]: mean standardised log
    length over the ``num_outputs`` int32 [n] outputs of the prompt. ``tenant_ids`` uint64 [n].
    """

    lexical: Matrix
    words: Matrix
    targets: Vector
    num_outputs: npt.NDArray[np.int32]
    tenant_ids: TenantIds

    def __len__(self) -> int:
        return len(self.targets)


def fit(examples: Examples, num_held_out: int) -> tuple[Fit, Vector]:
    """A fit to all examples, and the means that a fit without the last ``num_held_out`` targets predicts for them.

    O(n³). The scaling and the principal components are those of all examples in both cases.
    """
    mean = examples.lexical.mean(0)
    scale = examples.lexical.std(0) + np.float32(1e-3)
    whole = _feature_rows(examples.lexical, examples.words, mean, scale)
    squares = np.square(whole).sum(1)
    directions = np.ascontiguousarray(np.linalg.eigh(whole.T @ whole).eigenvectors[:, -_MAX_DIRECTIONS:])
    rows = whole @ directions
    kernel = _kernel(rows @ rows.T, squares[:, None], squares)
    np.fill_diagonal(kernel, 1 + _PROMPT_NOISE + _OUTPUT_NOISE / np.maximum(1, examples.num_outputs))
    inverse = np.linalg.inv(kernel)
    alpha = inverse @ examples.targets
    errors = np.abs(alpha / np.maximum(np.diag(inverse), 1e-6))  # leave-one-out residuals
    mean_spread = float(errors.mean())
    weights = np.stack([alpha, inverse @ (errors - np.float32(mean_spread))], axis=1).astype(np.float32)
    held_out = examples.targets[:0]
    if num_held_out:
        block = inverse[-num_held_out:, -num_held_out:]
        held_out = examples.targets[-num_held_out:] - np.linalg.solve(block, alpha[-num_held_out:])
    return Fit(mean, scale, directions, rows, squares, weights, examples.tenant_ids, mean_spread), held_out


def _feature_rows(lexical: Matrix, words: Matrix, mean: Vector, scale: Vector) -> Matrix:
    # np.clip takes much longer on a single row
    standard = np.minimum(np.maximum((lexical - mean) / scale, -4), 4) / np.float32(_LEXICAL_SCALE)
    return np.concatenate([standard, words * np.float32(_WORDS_SCALE)], axis=-1)


def _kernel(products: Matrix, left_squares: Matrix, right_squares: Matrix) -> Matrix:
    """The kernel of pairs with these inner products. Overwrites ``products``: allocation dominates the time."""
    distance = products
    distance *= -2
    distance += left_squares
    distance += right_squares
    np.maximum(distance, 0, out=distance)
    distance *= -_GAMMA
    wide = np.exp(distance, out=distance)
    narrow = np.square(wide)
    np.square(narrow, out=narrow)
    wide += narrow
    wide /= 2
    return wide
