from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from muxmesh.predictor.prompt_features import PromptFeatures
from muxmesh.predictor.regression import Examples, Fit, fit


def random_examples(count: int = 60, seed: int = 0, num_lexical: int = 5, num_words: int = 8) -> Examples:
    rng = np.random.default_rng(seed)
    lexical = rng.normal(2, 3, (count, num_lexical)).astype(np.float32)
    words = rng.normal(0, 0.3, (count, num_words)).astype(np.float32)
    return Examples(
        lexical, words, rng.normal(size=count).astype(np.float32), np.ones(count, np.int32), np.zeros(count, np.uint64)
    )


def with_targets(examples: Examples, targets: npt.NDArray[np.floating]) -> Examples:
    return replace(examples, targets=targets.astype(np.float32))


def features_of(examples: Examples, index: int) -> PromptFeatures:
    return PromptFeatures(examples.lexical[index], examples.words[index])


def mean_at(fitted: Fit, examples: Examples, index: int) -> float:
    return fitted.predict(features_of(examples, index))[0]


def test_held_out_predictions_do_not_depend_on_the_held_out_targets() -> None:
    examples = random_examples()
    changed = examples.targets.copy()
    changed[-10:] += 5
    _, expected = fit(examples, 10)
    _, again = fit(with_targets(examples, changed), 10)
    assert np.allclose(expected, again, atol=1e-3)


def test_a_fit_is_the_regression_along_its_directions_written_out() -> None:
    rng = np.random.default_rng(1)
    lexical, words = rng.normal(2, 3, (301, 30)).astype(np.float32), rng.normal(0, 0.1, (301, 150)).astype(np.float32)
    targets, counts = rng.normal(size=300).astype(np.float32), rng.integers(1, 5, 300).astype(np.int32)
    fitted, held_out = fit(Examples(lexical[:300], words[:300], targets, counts, np.zeros(300, np.uint64)), 20)
    assert fitted.directions.shape == (180, 128)
    standard = (lexical - lexical[:300].mean(0)) / (lexical[:300].std(0) + 1e-3)
    whole = np.concatenate([np.clip(standard, -4, 4) / 7, words * 0.85], axis=1).astype(np.float64)
    along = whole @ fitted.directions
    squares = np.square(whole).sum(1)
    distance = np.maximum(squares[:, None] + squares - 2 * along @ along.T, 0)
    kernel = (np.exp(-0.3 * distance) + np.exp(-1.2 * distance)) / 2
    known = kernel[:300, :300].copy()
    np.fill_diagonal(known, 1.0)
    assert np.linalg.eigvalsh(known)[0] >= 0
    known += np.diag(0.1 + 0.1 / counts)
    assert held_out == pytest.approx(known[280:, :280] @ np.linalg.solve(known[:280, :280], targets[:280]), abs=1e-4)
    expected = kernel[300, :300] @ np.linalg.solve(known, targets)
    assert fitted.predict(PromptFeatures(lexical[300], words[300]))[0] == pytest.approx(expected, abs=1e-4)


def test_the_spread_is_fitted_to_leave_one_out_errors() -> None:
    examples = random_examples(40)
    errors = []
    for index in range(40):
        last = [*range(index), *range(index + 1, 40), index]
        _, (expected,) = fit(
            Examples(
                examples.lexical[last],
                examples.words[last],
                examples.targets[last],
                examples.num_outputs[last],
                examples.tenant_ids[last],
            ),
            1,
        )
        errors.append(abs(expected - examples.targets[index]))
    assert fit(examples, 0)[0].mean_spread == pytest.approx(float(np.mean(errors)), rel=1e-3)


def test_the_spread_is_larger_where_errors_are_larger() -> None:
    rng, examples = np.random.default_rng(3), random_examples(200)
    is_noisy = examples.lexical[:, 0] > 2
    fitted, _ = fit(with_targets(examples, rng.normal(size=200) * np.where(is_noisy, 2.0, 0.2)), 0)
    spreads = np.array([fitted.predict(features_of(examples, index))[1] for index in range(200)])
    assert spreads[is_noisy].mean() > 2 * spreads[~is_noisy].mean()


def test_the_spread_has_a_lower_limit() -> None:
    examples = random_examples()
    fitted, _ = fit(with_targets(examples, np.zeros(60)), 0)
    mean, spread = fitted.predict(features_of(examples, 0))
    assert mean == 0.0 and spread == pytest.approx(0.2)


def test_a_prompt_with_more_outputs_is_predicted_closer_to_their_mean() -> None:
    examples, index = random_examples(), 7
    once, _ = fit(with_targets(examples, np.eye(60)[index]), 0)
    counts = examples.num_outputs.copy()
    counts[index] = 30
    often, _ = fit(replace(with_targets(examples, np.eye(60)[index]), num_outputs=counts), 0)
    assert 0 < mean_at(once, examples, index) < mean_at(often, examples, index) < 1


def test_a_prompt_unlike_all_examples_is_predicted_at_the_mean_of_all_outputs() -> None:
    examples = random_examples()
    fitted, _ = fit(with_targets(examples, np.full(60, 3.0)), 0)
    far = PromptFeatures(examples.lexical[0], np.full(8, 9.0, np.float32))
    assert mean_at(fitted, examples, 0) > 1
    assert fitted.predict(far)[0] == pytest.approx(0, abs=1e-6)


def test_an_extreme_lexical_feature_counts_as_four_deviations() -> None:
    examples = random_examples()
    fitted, _ = fit(examples, 0)
    extreme, limit = examples.lexical[0].copy(), examples.lexical[0].copy()
    extreme[2], limit[2] = 1e6, fitted.mean[2] + 4 * fitted.scale[2]
    predictions = [fitted.predict(PromptFeatures(lexical, examples.words[0])) for lexical in (extreme, limit)]
    assert predictions[0] == pytest.approx(predictions[1], abs=1e-5)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_few_examples_can_be_fitted(count: int) -> None:
    examples = random_examples(count)
    fitted, held_out = fit(examples, 0)
    mean, spread = fitted.predict(features_of(examples, 0))
    assert np.isfinite([mean, spread]).all() and len(held_out) == 0
    assert fitted.directions.shape == (13, 13) and fitted.rows.shape == (count, 13)


def test_a_feature_that_is_the_same_in_all_examples_has_no_effect() -> None:
    examples = random_examples()
    lexical = examples.lexical.copy()
    lexical[:, 1] = 5.0
    fitted, _ = fit(replace(examples, lexical=lexical), 0)
    reduced = replace(examples, lexical=np.delete(lexical, 1, axis=1))
    assert mean_at(fitted, replace(examples, lexical=lexical), 3) == pytest.approx(
        mean_at(fit(reduced, 0)[0], reduced, 3), abs=1e-4
    )
