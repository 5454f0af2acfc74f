"""Values that cross boundaries inside the mesh. Knows no wire format, no engine and no I/O."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Literal

KvFormat = Literal["raw", "int8"]
"""How KV is kept outside the pool: as it is, or quantized."""

_NORMAL = NormalDist()
_Z90 = _NORMAL.inv_cdf(0.9)
_LAST_PLACE = 6.0

DEFAULT_ADDRESS = "127.0.0.1:50051"
"""Of the public API, where nothing else is said."""


class FinishReason(enum.Enum):
    """Why an engine ended a job."""

    LENGTH = "length"
    STOP_TOKEN = "stop_token"  # noqa: S105 - not a secret
    EOS = "eos"


@dataclass(frozen=True, slots=True)
class Finish:
    """The end of a job. ``token_id`` is the token that ended it, None for LENGTH."""

    reason: FinishReason
    token_id: int | None = None


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. The defaults of everything but the temperature are off.

    ``temperature`` 0 is greedy. Presence and frequency penalties look at the answer, the repetition penalty at prompt
    and answer. ``allowed_token_ids`` None: all. ``logprobs`` and ``prompt_logprobs`` None: not wanted; n: with the n
    likeliest candidates.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        """True if the likeliest token is taken and no number is drawn."""
        return self.temperature == 0.0

    @property
    def looks_back(self) -> bool:
        """True if a draw depends on the tokens before it by more than the logits."""
        return bool(self.presence_penalty or self.frequency_penalty) or self.repetition_penalty != 1.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """A token at one place, its log-probability, and its rank there (1 is the likeliest)."""

    token_id: int
    logprob: float
    rank: int


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one place: of the token that is there, and of the likeliest, best first.

    They are the model's own: before penalties, bias, temperature and filters.
    """

    chosen: Candidate
    top: tuple[Candidate, ...] = ()


@dataclass(frozen=True, slots=True)
class Stopping:
    """When an answer ends, in tokens. Stop strings are the router's business."""

    max_new_tokens: int
    min_new_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    eos_token_ids: frozenset[int] = frozenset()

    def finish_after(self, token_id: int, num_output_tokens: int) -> Finish | None:
        """The end that ``token_id`` brings as the ``num_output_tokens``-th output token, or None."""
        if num_output_tokens >= self.min_new_tokens:
            if token_id in self.eos_token_ids:
                return Finish(FinishReason.EOS, token_id)
            if token_id in self.stop_token_ids:
                return Finish(FinishReason.STOP_TOKEN, token_id)
        if num_output_tokens >= self.max_new_tokens:
            return Finish(FinishReason.LENGTH)
        return None

    def banned_at(self, output_index: int) -> frozenset[int]:
        """Token ids that may not be drawn at this place of the answer, so that ``min_new_tokens`` holds."""
        if output_index + 1 >= self.min_new_tokens:
            return frozenset()
        return self.eos_token_ids | self.stop_token_ids


@dataclass(frozen=True, slots=True)
class Standing:
    """What an order knows of a request. ``arrived_at_s`` is unix time.

    Work is predicted, in seconds of its own prefill and decode steps: ``prefill_s`` and ``decode_s`` that are left,
    ``served_s`` that it has had. ``typical_s`` is that of a typical request about when it came (`router.work`). Nothing
    predicted is 0 everywhere: the same work for all.
    """

    priority: int
    arrived_at_s: float
    prefill_s: float = 0.0
    decode_s: float = 0.0
    served_s: float = 0.0
    typical_s: float = 0.0

    @property
    def left_s(self) -> float:
        """Work left."""
        return self.prefill_s + self.decode_s

    def prefilled(self, share: float) -> Standing:
        """With ``share`` of its prompt, in [0, 1], found computed already."""
        return self if share == 0 else replace(self, prefill_s=self.prefill_s * (1 - share))

    def after(
        self, num_output_tokens: int, prediction: LengthPrediction | None, since: int = 0, prefill_again: bool = False
    ) -> Standing:
        """With so many tokens of the answer out, where this standing had ``since`` of them: less is left, or more if
        the answer has outlived its prediction. ``prefill_again``: the prompt is to be computed once more.
        """
        if prediction is None or num_output_tokens <= since:
            return self
        left_s = self.decode_s * prediction.remaining_tokens(num_output_tokens) / prediction.remaining_tokens(since)
        per_token_s = self.decode_s / prediction.remaining_tokens(since)
        served_s = self.served_s + self.prefill_s + per_token_s * (num_output_tokens - since)
        return replace(self, prefill_s=self.prefill_s if prefill_again else 0.0, decode_s=left_s, served_s=served_s)


@dataclass(frozen=True, slots=True)
class LengthPrediction:
    """A guess of the output length, in tokens: half are no longer than ``p50_tokens``, nine in ten than ``p90_tokens``.

    The whole distribution is taken to be log-normal, which those two determine: lengths are heavy-tailed.
    """

    p50_tokens: float
    p90_tokens: float

    def remaining_tokens(self, num_output_tokens: int) -> float:
        """The median of what is left of an answer that has ``num_output_tokens`` already: at least 1.

        An answer that outlives its prediction is expected to go on the longer the more uncertain the prediction was.
        """
        if num_output_tokens < 1:
            return max(1.0, self.p50_tokens)
        spread = math.log(max(self.p90_tokens / self.p50_tokens, 1.0 + 1e-6)) / _Z90
        place = math.log(num_output_tokens / self.p50_tokens) / spread
        if place > _LAST_PLACE:  # the normal distribution's own tail, where its values underflow
            return max(1.0, num_output_tokens * math.expm1(spread * math.log(2) / place))
        beyond = 1 - _NORMAL.cdf(place)
        median = self.p50_tokens * math.exp(spread * -_NORMAL.inv_cdf(beyond / 2))
        return max(1.0, median - num_output_tokens)


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """A request as the workers know it: tokens, no text.

    ``resume_token_ids`` are output tokens that the client already has. They are computed again after a
    worker was lost, and never sampled again. ``sequence`` tells apart the answers to one prompt. Requests share
    cached prefixes only under the same ``cache_salt``. ``kv_swap_format`` None: the model's own.
    """

    request_id: str
    model: str
    prompt_token_ids: tuple[int, ...]
    sampling: Sampling
    stopping: Stopping
    standing: Standing
    resume_token_ids: tuple[int, ...] = ()
    prediction: LengthPrediction | None = None
    sequence: int = 0
    cache_salt: str = ""
    bypass_prefix_cache: bool = False
    kv_swap_format: KvFormat | None = None

    @property
    def most_tokens(self) -> int:
        """Prompt and the longest possible answer."""
        return len(self.prompt_token_ids) + self.stopping.max_new_tokens


@dataclass(frozen=True, slots=True)
class KvDemand:
    """What a request needs of the pool: room for ``num_tokens`` at first, for ``most_tokens`` with the longest answer.

    ``block_hashes`` name the full blocks of what is known of the sequence; up to ``max_cached_tokens`` of it may be
    taken from the prefix cache.
    """

    num_tokens: int
    most_tokens: int
    block_hashes: tuple[bytes, ...] = ()
    max_cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class LeaseRef:
    """Names a lease at one epoch. Each move to another owner raises the epoch."""

    lease_id: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Lease:
    """The right of one owner to a request's token blocks, and how far its KV is computed.

    ``sampled_token_ids`` are output tokens that are sampled but whose KV is not computed. ``handoff`` is
    opaque: what an engine that owns its KV needs to find it.
    """

    ref: LeaseRef
    model: str
    block_ids: tuple[int, ...]
    num_computed_tokens: int = 0
    sampled_token_ids: tuple[int, ...] = ()
    handoff: bytes = b""


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Token blocks that hold ``num_tokens`` tokens."""
    return -(-num_tokens // block_size)
