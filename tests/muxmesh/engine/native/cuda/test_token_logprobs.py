"""Log-probabilities on the device, compared with those of the host's sampler."""

import numpy as np
import pytest
import torch

from muxmesh.device.torch_device import open_torch_device
from muxmesh.engine.native.cuda.token_logprobs import score_tokens
from muxmesh.engine.token_sampler import token_logprobs

DEVICE = open_torch_device()


def scored(
    logits: np.ndarray, rows: list[int], token_ids: list[int], num_candidates: int
) -> tuple[list[float], list[int], list[list[int]], list[list[float]]]:
    uploaded_rows, uploaded_ids = DEVICE.upload(np.array(rows)), DEVICE.upload(np.array(token_ids))
    logprobs, ranks, top_ids, top_logprobs = score_tokens(
        DEVICE.upload(logits), uploaded_rows, uploaded_ids, num_candidates
    )
    assert (logprobs.dtype, ranks.dtype, top_ids.dtype) == (torch.float64, torch.int64, torch.int64)
    return logprobs.tolist(), ranks.tolist(), top_ids.tolist(), top_logprobs.tolist()


@pytest.mark.parametrize("num_candidates", [0, 1, 3, 9, 20])
def test_tokens_of_any_rows_are_scored_as_on_the_host(num_candidates: int) -> None:
    logits = np.round(np.random.default_rng(1).normal(0, 2, (4, 9))).astype(np.float32)  # ties
    logits[2, 3] = -np.inf
    rows, token_ids = [3, 0, 2, 2, 2], [8, 0, 4, 3, 4]
    logprobs, ranks, top_ids, top_logprobs = scored(logits, rows, token_ids, num_candidates)
    for i, (row, token_id) in enumerate(zip(rows, token_ids, strict=True)):
        expected = token_logprobs(logits[row], token_id, num_candidates)
        assert logprobs[i] == pytest.approx(expected.chosen.logprob, abs=1e-9)
        assert ranks[i] == expected.chosen.rank
        assert top_ids[i] == [candidate.token_id for candidate in expected.top]
        assert top_logprobs[i] == pytest.approx([candidate.logprob for candidate in expected.top], abs=1e-9)


def test_equal_logits_share_a_rank_and_are_listed_by_id() -> None:
    logits = np.array([[1.0, 2.0, 0.0, 2.0, -0.0, 2.0]], dtype=np.float32)
    _, ranks, top_ids, _ = scored(logits, [0] * 6, list(range(6)), 6)
    assert ranks == [4, 1, 5, 1, 5, 1], "0.0 and -0.0 are equal"
    assert top_ids == [[1, 3, 5, 0, 2, 4]] * 6


def test_logits_at_the_ends_of_f32_have_finite_log_probabilities() -> None:
    most = float(np.finfo(np.float32).max)
    logprobs, ranks, top_ids, top_logprobs = scored(np.array([[-most, most, 0.0]], dtype=np.float32), [0, 0], [1, 0], 2)
    assert logprobs == [0.0, -2 * most] and ranks == [1, 3]
    assert top_ids == [[1, 2]] * 2 and top_logprobs == [[0.0, -most]] * 2


def test_rows_that_are_scored_in_several_passes_have_the_values_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = np.random.default_rng(2).normal(0, 3, (5, 7)).astype(np.float32)
    rows, token_ids = [4, 1, 3, 0, 2], [0, 6, 2, 5, 1]
    whole = scored(logits, rows, token_ids, 3)
    for most_elements in (1, 14):
        monkeypatch.setattr("muxmesh.engine.native.cuda.token_logprobs._ELEMENTS_AT_ONCE", most_elements)
        assert scored(logits, rows, token_ids, 3) == whole
