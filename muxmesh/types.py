"""Frozen values that the processes of the mesh exchange. Knows no wire format, no engine and no I/O."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field, replace
from enum import StrEnum
from statistics import NormalDist
from typing import Literal

Dtype = Literal["float32", "float16", "bfloat16"]
"""Data type of weights, activations or KV."""

KvFormat = Literal["raw", "int8"]
"""Format of swapped KV: the exact bits, or quantized to 8 bits."""
PreemptionMode = Literal["auto", "swap", "recompute", "keep"]
"""What becomes of the KV of a sequence whose memory another one needs: see `preemption_mode` of a unit."""

ArbiterMode = Literal["auto", "adbs", "fcfs", "roundrobin", "temporal", "spatial"]
"""The rule by which the arbiter of a unit chooses who computes. `ArbiterConfig.mode` describes each."""

SWAP_PAGE_BYTES = 16 * 1024
"""Allocation granularity of the swap region."""

_NORMAL = NormalDist()
Z90 = _NORMAL.inv_cdf(0.9)
"""The 90th percentile of the standard normal distribution."""
_MAX_QUANTILE = 6.0

DEFAULT_ADDRESS = "127.0.0.1:50051"
"""HOST:PORT of the public API unless another is configured."""
MAX_PORT = 65535


class Role(StrEnum):
    """The two phases of a request. Each has its own workers."""

    PREFILL = "prefill"
    DECODE = "decode"


class FinishReason(enum.Enum):
    """Why an engine finished a sequence."""

    LENGTH = "length"
    STOP_TOKEN = "stop_token"  # noqa: S105 - not a secret
    EOS = "eos"


@dataclass(frozen=True, slots=True)
class Finish:
    """Why and with which token a sequence finished. ``token_id`` is None for LENGTH."""

    reason: FinishReason
    token_id: int | None = None


MAX_TEMPERATURE = 100.0
MAX_REPETITION_PENALTY = 100.0


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling parameters of one sequence. The defaults sample from the unmodified distribution.

    ``temperature`` 0 is greedy. ``top_k`` 0 keeps all tokens. Presence and frequency penalties apply to output tokens,
    the repetition penalty to prompt and output. ``logit_bias`` holds (token id, bias) pairs. ``allowed_token_ids`` None
    allows all tokens. ``logprobs`` and ``prompt_logprobs`` are the number of most likely candidates to return at each
    position; None returns no log-probabilities.
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
        """True if the most likely token is chosen without a random number."""
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        """True if earlier tokens change the logits through a penalty."""
        return bool(self.presence_penalty or self.frequency_penalty) or self.repetition_penalty != 1.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """A token at one position with its log-probability and rank; rank 1 is the most likely token."""

    token_id: int
    logprob: float
    rank: int


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position: of the chosen token, and of the most likely tokens in descending order.

    They are those of the model, before penalties, bias, temperature and filters.
    """

    chosen: Candidate
    top: tuple[Candidate, ...] = ()


@dataclass(frozen=True, slots=True)
class Stopping:
    """Conditions on tokens that finish a sequence. The router handles stop strings."""

    max_new_tokens: int
    min_new_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    eos_token_ids: frozenset[int] = frozenset()

    def finish_after(self, token_id: int, num_output_tokens: int) -> Finish | None:
        """The finish caused by ``token_id`` as the ``num_output_tokens``-th output token, or None."""
        if num_output_tokens >= self.min_new_tokens:
            if token_id in self.eos_token_ids:
                return Finish(FinishReason.EOS, token_id)
            if token_id in self.stop_token_ids:
                return Finish(FinishReason.STOP_TOKEN, token_id)
        if num_output_tokens >= self.max_new_tokens:
            return Finish(FinishReason.LENGTH)
        return None

    def banned_at(self, output_index: int) -> frozenset[int]:
        """Token ids that may not be sampled at this output index, so that ``min_new_tokens`` holds."""
        if output_index + 1 >= self.min_new_tokens:
            return frozenset()
        return self.eos_token_ids | self.stop_token_ids


SOURCES = ("retrieved", "regressed", "median", "cold", "hint", "fixed", "floor", "failed", "late")
"""Origins of an expected output length, as `muxmesh.v1.SchedulingInfo` describes them."""
UNPREDICTED = frozenset({"floor", "failed", "late", "cold", "median"})
"""Sources whose prediction is the same for every request of a model. It changes fast while few outputs are observed."""


@dataclass(frozen=True, slots=True)
class LengthPrediction:
    """Predicted output length in tokens: the median and the 0.9 quantile.

    The two determine a log-normal distribution, since output lengths are heavy-tailed.
    """

    p50_tokens: float
    p90_tokens: float

    def remaining_tokens(self, num_output_tokens: int, exceeded_by: float = 0.5) -> float:
        """Median of the remaining output of a sequence that has ``num_output_tokens`` so far, in tokens; at least 1.

        It is the median of the distribution's tail. Past the predicted length, it grows with the spread of the
        distribution. ``exceeded_by``: the fraction of outputs that are longer, 0.1 for the 0.9 quantile.
        """
        spread = math.log(max(self.p90_tokens / self.p50_tokens, 1.0 + 1e-6)) / Z90
        if num_output_tokens < 1:
            return max(1.0, self.p50_tokens * math.exp(spread * -_NORMAL.inv_cdf(exceeded_by)))
        quantile = math.log(num_output_tokens / self.p50_tokens) / spread
        if quantile > _MAX_QUANTILE:  # asymptotic tail of the normal distribution, where 1 - cdf underflows
            return max(1.0, num_output_tokens * math.expm1(spread * -math.log(exceeded_by) / quantile))
        tail = 1 - _NORMAL.cdf(quantile)
        length = self.p50_tokens * math.exp(spread * -_NORMAL.inv_cdf(tail * exceeded_by))
        return max(1.0, length - num_output_tokens)


_GROUP_SHIFT = 33
"""The difference of two priority classes has at most this many bits, so a group outweighs every class."""


@dataclass(frozen=True, slots=True)
class TenantStanding:
    """Where the tenant of a request stands beside the others of a unit. The unit alone determines it.

    ``group``: how far the tenant is ahead of the least served one, its better requests included, in bands; a lower
    group goes first (`kvstore.tenant_order`). ``best_priority``: the best priority class among the tenant's own
    requests, to which a class is relative while there are other tenants. ``has_rivals``: whether other tenants have
    requests; without any, group and class are what they would be without tenants. ``has_overdue_lane``: whether the
    request precedes all others once it is overdue.
    """

    group: int = 0
    best_priority: int = 0
    has_rivals: bool = False
    has_overdue_lane: bool = True
    tenant_number: int = 0
    """Two requests of one unit whose tenants are told apart have the same number if they have the same tenant."""
    offset: int = field(init=False, compare=False, repr=False)
    """Added to the priority class it gives the precedence."""

    def __post_init__(self) -> None:
        offset = (self.group << _GROUP_SHIFT) - self.best_priority if self.has_rivals else 0
        object.__setattr__(self, "offset", offset)


SOLE_TENANT = TenantStanding()


@dataclass(frozen=True, slots=True)
class SchedulingState:
    """The input of a scheduling policy for one request. ``arrived_at_s`` is unix time.

    Work is predicted, in seconds of the request's own prefill and decode steps. ``prefill_s`` and ``decode_s`` are the
    remaining work, ``served_s`` the work already done. ``mean_work_s`` is the mean work of a request at the time of
    arrival (`router.expected_work`). Without a prediction all four are 0, so that all requests have equal work.
    ``longest_lead_s``: for ``srtf-aged``, how much later a request may arrive at most and overtake this one; 0: as long
    as the policy says for the mean work.
    ``queued_per_slot``: requests of its model that were queued at its arrival, divided by ``max_num_seqs``.
    ``num_preemptions``: how often others displaced it from a batch before its KV was freed, over all such times.
    ``standing``: that of its tenant, as its unit has determined it.
    """

    priority: int
    arrived_at_s: float
    prefill_s: float = 0.0
    decode_s: float = 0.0
    served_s: float = 0.0
    mean_work_s: float = 0.0
    num_preemptions: int = 0
    queued_per_slot: float = 0.0
    longest_lead_s: float = 0.0
    standing: TenantStanding = SOLE_TENANT

    @property
    def remaining_s(self) -> float:
        return self.prefill_s + self.decode_s

    @property
    def precedence(self) -> int:
        """Group of its tenant, then class within the tenant, as one number. Lower goes first.

        Without other tenants it is the priority class.
        """
        return self.priority + self.standing.offset

    @property
    def class_rank(self) -> int:
        """Its priority class, relative to the best one of its tenant while there are other tenants."""
        standing = self.standing
        return self.priority - standing.best_priority if standing.has_rivals else self.priority

    def with_standing(self, standing: TenantStanding) -> SchedulingState:
        """The state under another standing of its tenant."""
        return replace(self, standing=standing)

    def with_cached_fraction(self, fraction: float) -> SchedulingState:
        """The state if the prefix cache holds ``fraction`` of the prompt, in [0, 1]."""
        return self if fraction == 0 else replace(self, prefill_s=self.prefill_s * (1 - fraction))

    def after_output(
        self, num_output_tokens: int, prediction: LengthPrediction | None, since: int = 0, prefill_again: bool = False
    ) -> SchedulingState:
        """The state after ``num_output_tokens`` of output; this state is the one after ``since`` of them.

        The remaining work decreases, or increases if the output is longer than predicted. ``prefill_again``: the KV of
        the prompt was freed, so its prefill remains.
        """
        if prediction is None or num_output_tokens <= since:
            return self
        per_token_s = self.decode_s / prediction.remaining_tokens(since)
        remaining = prediction.remaining_tokens(num_output_tokens)
        after = self.after_tokens(num_output_tokens - since, per_token_s, remaining)
        return replace(after, prefill_s=self.prefill_s) if prefill_again else after

    def after_tokens(self, num_tokens: int, per_token_s: float, remaining_tokens: float) -> SchedulingState:
        """The state after the prefill and ``num_tokens`` more tokens, each ``per_token_s`` seconds of work."""
        served_s = self.served_s + self.prefill_s + per_token_s * num_tokens
        return self.with_work(per_token_s * remaining_tokens, served_s)

    def with_work(self, decode_s: float, served_s: float) -> SchedulingState:
        """The state after the prefill, with this work left and done."""
        return SchedulingState(
            self.priority,
            self.arrived_at_s,
            0.0,
            decode_s,
            served_s,
            self.mean_work_s,
            self.num_preemptions,
            self.queued_per_slot,
            self.longest_lead_s,
            self.standing,
        )


class WaitCause(StrEnum):
    """What a request waits for before its first token."""

    SLOT = "slot"
    KV = "kv"
    ORDER = "order"
    WORKER = "worker"
    DEVICE = "device"


@dataclass(frozen=True, slots=True)
class Waits:
    """Seconds that a request waited before its first token, by `WaitCause`.

    ``slot_s``: for a slot in the batch of a decode worker. ``kv_s``: for KV memory, or for memory within its model's
    quota. ``order_s``: while other requests of its model were before it. ``worker_s``: for a ready worker.
    ``device_s``: in prefill, while no step computed it.
    """

    slot_s: float = 0.0
    kv_s: float = 0.0
    order_s: float = 0.0
    worker_s: float = 0.0
    device_s: float = 0.0

    def plus(self, other: Waits) -> Waits:
        """The sum of both by cause."""
        return Waits(
            self.slot_s + other.slot_s,
            self.kv_s + other.kv_s,
            self.order_s + other.order_s,
            self.worker_s + other.worker_s,
            self.device_s + other.device_s,
        )


NO_WAITS = Waits()


@dataclass(frozen=True, slots=True)
class SloTargets:
    """The latency that one request is to have, in seconds; None: no target. `muxmesh.slo` computes and uses it.

    ``ttft_s`` counts from the arrival at the router, ``tpot_s`` is for each token after the first. ``waited_s``: from
    the arrival until the router sent the request to a worker, by the router's clock, and in a decode worker until the
    hand-off. A worker counts on from there by its own clock, so the clocks of two hosts need not agree.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    waited_s: float = 0.0

    def after_wait(self, seconds: float) -> SloTargets:
        """The targets of a request that has waited for ``seconds`` more."""
        return replace(self, waited_s=self.waited_s + seconds)


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One sequence for the workers: tokens, no text.

    ``resume_token_ids`` are output tokens that the client received from an earlier attempt. Their KV is computed again,
    but they are not sampled again. ``sequence_index`` numbers the output sequences of one prompt. Requests share cached
    prefixes only within one ``tenant`` and ``cache_salt``. ``kv_swap_format`` None is the model's default.
    ``slo`` is None for a model without one. ``tenant_weight``: the service that the tenant is due, relative to others.
    """

    request_id: str
    model: str
    prompt_token_ids: tuple[int, ...]
    sampling: Sampling
    stopping: Stopping
    scheduling: SchedulingState
    resume_token_ids: tuple[int, ...] = ()
    prediction: LengthPrediction | None = None
    sequence_index: int = 0
    tenant: str = ""
    cache_salt: str = ""
    bypass_prefix_cache: bool = False
    kv_swap_format: KvFormat | None = None
    slo: SloTargets | None = None
    tenant_weight: float = 1.0

    @property
    def max_tokens(self) -> int:
        """Length of the prompt and the longest possible output."""
        return len(self.prompt_token_ids) + self.stopping.max_new_tokens

    def after_wait(self, seconds: float) -> EngineRequest:
        """The request after it has waited for ``seconds`` more, which its SLO counts."""
        return self if self.slo is None else replace(self, slo=self.slo.after_wait(seconds))


@dataclass(frozen=True, slots=True)
class KvDemand:
    """Token blocks that a request needs: for ``num_tokens`` at admission, and for ``max_tokens`` at most.

    ``block_hashes`` are those of the full blocks of the known tokens. The prefix cache may provide at most
    ``max_cached_tokens`` of these tokens. ``num_known_tokens``: those of prompt and output so far, which prefill
    computes; 0: not known.
    """

    num_tokens: int
    max_tokens: int
    block_hashes: tuple[bytes, ...] = ()
    max_cached_tokens: int = 0
    num_known_tokens: int = 0


@dataclass(frozen=True, slots=True)
class QueuedRequest:
    """A request in a router's queue, as a unit sees it: its order and its KV demand, without the prompt.

    ``entry_id`` is chosen by the router and unique within its admission stream. ``tenant_weight``: the service that the
    tenant is due, relative to others; above 0.
    """

    entry_id: int
    model: str
    scheduling: SchedulingState
    demand: KvDemand
    tenant: str = ""
    tenant_weight: float = 1.0


@dataclass(frozen=True, slots=True)
class LeaseRef:
    """Identifies a lease at one epoch. Each change of owner increments the epoch."""

    lease_id: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Lease:
    """The right of one owner to the token blocks of a sequence, with the number of tokens whose KV is computed.

    ``sampled_token_ids`` are the output tokens sampled since the lease was issued. The KV of the last one is not
    computed.
    """

    ref: LeaseRef
    model: str
    block_ids: tuple[int, ...]
    num_computed_tokens: int = 0
    sampled_token_ids: tuple[int, ...] = ()


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Number of token blocks that ``num_tokens`` tokens occupy."""
    return -(-num_tokens // block_size)
