"""The remaining work of one sequence as it decodes, by its predicted output length. Pure.

The length of an output is predicted once, before it begins. While the sequence decodes, the prediction is conditioned
on the tokens so far: at fixed fractions of the median, and again whenever the output is as long as was expected last.
In between the work decreases with each token. Decode workers and the simulator use it.
"""

from __future__ import annotations

import math

from muxmesh.types import LengthPrediction, SchedulingState, TenantStanding

REPREDICT_AT = (0.25, 0.5, 1.0)
"""Fractions of the predicted median at which the expected length is computed again from the tokens so far."""
REFRESH_TOKENS = 16
"""The scheduling state of a sequence is computed again after this many tokens, or with a new prediction."""


class RemainingWork:
    """Owns the expected output length of one sequence, and its scheduling state by it.

    Without a prediction the state stays as it is, and so does the order.
    """

    def __init__(
        self,
        start: SchedulingState,
        prediction: LengthPrediction | None,
        num_output_tokens: int = 0,
        max_output_tokens: float = math.inf,
    ) -> None:
        """``start``: the state with ``num_output_tokens`` so far, and its prefill not done."""
        self.state = start
        """The state of now, or of at most `REFRESH_TOKENS` tokens ago."""
        self.num_repredictions = 0
        self._start, self._prediction, self._since = start, prediction, num_output_tokens
        self._num_output_tokens, self._max_output_tokens = num_output_tokens, max_output_tokens
        self._expected_tokens, self._per_token_s = math.inf, 0.0
        self._repredict_at = self._refresh_at = math.inf
        if prediction is not None:
            remaining = prediction.remaining_tokens(num_output_tokens)
            self._expected_tokens = min(num_output_tokens + remaining, max_output_tokens)
            self._per_token_s = start.decode_s / remaining
            self._repredict_at = self._next_prediction(prediction, num_output_tokens)
            self._refresh_at = num_output_tokens + 1  # the first token ends the prefill

    def set_standing(self, standing: TenantStanding) -> None:
        """The unit has determined another standing of the sequence's tenant."""
        self._start = self._start.with_standing(standing)
        self.state = self.state.with_standing(standing)

    def served_s(self, num_output_tokens: int) -> float:
        """Work done by ``num_output_tokens`` in seconds, as in `SchedulingState.served_s`; 0 without a prediction."""
        num_tokens = num_output_tokens - self._since
        return self._start.served_s + self._start.prefill_s + self._per_token_s * num_tokens if num_tokens > 0 else 0.0

    @property
    def expected_tokens(self) -> float:
        """The expected length of the whole output; infinite without a prediction."""
        return self._expected_tokens

    def is_past(self, fraction: float) -> bool:
        """Whether ``fraction`` of the expected output is sampled."""
        return self._num_output_tokens >= fraction * self._expected_tokens

    def update(self, num_output_tokens: int) -> None:
        """The output has ``num_output_tokens`` now."""
        self._num_output_tokens = num_output_tokens
        if num_output_tokens < self._refresh_at or self._prediction is None:
            return
        if num_output_tokens >= self._repredict_at:
            remaining = self._prediction.remaining_tokens(num_output_tokens)
            self._expected_tokens = min(num_output_tokens + remaining, self._max_output_tokens)
            self._repredict_at = self._next_prediction(self._prediction, num_output_tokens)
            self.num_repredictions += 1
        remaining = max(1.0, self._expected_tokens - num_output_tokens)
        self.state = self._start.after_tokens(num_output_tokens - self._since, self._per_token_s, remaining)
        self._refresh_at = min(num_output_tokens + REFRESH_TOKENS, self._repredict_at)

    def tokens_until_prediction(self, num_output_tokens: int) -> int | None:
        """After how many more tokens `update` will compute the expected length again; None: never."""
        return None if self._prediction is None else max(1, math.ceil(self._repredict_at - num_output_tokens))

    def tokens_until_change(self, num_output_tokens: int, fraction: float) -> int | None:
        """After how many more tokens `update` changes ``state``, or `is_past` of ``fraction``; None: never."""
        past = fraction * self._expected_tokens
        point = self._refresh_at if num_output_tokens >= past else min(self._refresh_at, past)
        return None if point == math.inf else max(1, math.ceil(point) - num_output_tokens)

    def _next_prediction(self, prediction: LengthPrediction, num_output_tokens: int) -> float:
        points = (fraction * prediction.p50_tokens for fraction in REPREDICT_AT)
        point = next((one for one in points if one > num_output_tokens), None)
        if point is not None:
            return math.ceil(point)
        return max(num_output_tokens + REFRESH_TOKENS, math.ceil(self._expected_tokens))
