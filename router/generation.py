"""A generation request and the deltas of its output, as values. Knows no wire format.

An API (`router.api`) converts its messages to a `GenerationRequest`, and each `OutputDelta` to a message. Errors name a
field by its path in `muxmesh.v1.GenerateRequest`; an API with other field names translates them. A sequence in a
request may be a view of the message: validation bounds its length before anything copies it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from muxmesh.execution import Execution
from muxmesh.models.token_texts import TokenText
from muxmesh.tenants.tenant import OPEN_TENANT, Tenant
from muxmesh.types import NO_WAITS, KvFormat, Sampling, TokenLogprobs, Waits


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Text that is tokenized without a chat template."""

    text: str


@dataclass(frozen=True, slots=True)
class TokensPrompt:
    """Token ids of the model's own tokenizer."""

    token_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation, rendered by the model's own chat template."""

    messages: tuple[ChatMessage, ...]


Prompt = TextPrompt | TokensPrompt | ChatPrompt


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """A prompt as tokens, and the context of its model in tokens. ``texts``: one for each token, if requested."""

    token_ids: list[int]
    max_model_len: int
    texts: Sequence[TokenText] = ()


@dataclass(frozen=True, slots=True)
class StoppingOptions:
    """When an output ends. ``max_new_tokens`` None: the model's default, limited by the context and the KV pool."""

    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    stop_token_ids: Sequence[int] = ()
    stop_strings: Sequence[str] = ()
    include_stop_strings: bool = False
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """Which parts of the output the client receives."""

    text: bool = True
    token_ids: bool = False
    prompt_token_ids: bool = False
    skip_special_tokens: bool = True
    scheduling: bool = False
    prompt_logprobs: bool = False


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What a client requests. ``sampling.seed`` is ignored: ``seed`` replaces it, or a random seed if that is None.

    ``unset_sampling`` names the fields of ``sampling`` that the model's own defaults replace.
    """

    model: str
    prompt: Prompt
    request_id: str = ""
    sampling: Sampling = field(default_factory=Sampling)
    unset_sampling: frozenset[str] = frozenset()
    seed: int | None = None
    num_sequences: int = 1
    stopping: StoppingOptions = StoppingOptions()
    output: OutputOptions = OutputOptions()
    truncate_prompt_tokens: int | None = None
    priority: int = 0
    expected_output_tokens: int | None = None
    tenant: Tenant = OPEN_TENANT
    cache_salt: str = ""
    bypass_prefix_cache: bool = False
    kv_swap_format: KvFormat | None = None
    ticket: str = ""
    """Of an earlier refusal; see `router.queue_limit`."""
    deadline_s: float = math.inf
    """When the client no longer wants the output. Monotonic time."""


class FinishKind(Enum):
    """Why an output ended."""

    LENGTH = "length"
    EOS = "eos"
    STOP_TOKEN = "stop_token"  # noqa: S105 - not a secret
    STOP_STRING = "stop_string"


@dataclass(frozen=True, slots=True)
class OutputFinish:
    """The end of one output sequence, and the token or the string that caused it."""

    kind: FinishKind
    num_output_tokens: int
    token_id: int | None = None
    stop_string: str | None = None


@dataclass(frozen=True, slots=True)
class SequenceDelta:
    """New tokens and text of one output sequence. ``logprobs`` has one entry for each token, if requested."""

    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish: OutputFinish | None = None


@dataclass(frozen=True, slots=True)
class PromptReport:
    """The prompt as it was computed. ``predicted_output_tokens`` is None if the length predictor was not used."""

    token_ids: tuple[int, ...]
    num_cached_tokens: int
    seed: int
    predicted_output_tokens: int | None
    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class SchedulingReport:
    """Why a request was served when it was. `muxmesh.v1.SchedulingInfo` defines the fields."""

    policy: str
    reason: str
    p50_output_tokens: float
    p90_output_tokens: float
    source: str
    prefill_s: float
    decode_s: float
    waited_s: float
    decision: int
    num_overtaken: int
    waited_for: Waits = NO_WAITS
    unit: str = ""
    unit_reason: str = ""


@dataclass(frozen=True, slots=True)
class TimingsReport:
    """Times of a request in seconds. `muxmesh.v1.RequestTimings` defines them."""

    queue_s: float
    ttft_s: float
    e2e_s: float
    num_restarts: int
    router_s: float
    met_slo: bool | None = None


@dataclass(frozen=True, slots=True)
class OutputDelta:
    """New output of sequence ``index``.

    The first delta of a request has the reports, the last one has the timings and, as ``scheduling``, if it is
    requested, what became of the request.
    """

    index: int
    new: SequenceDelta
    prompt: PromptReport | None = None
    scheduling: SchedulingReport | None = None
    timings: TimingsReport | None = None
    execution: Execution | None = None


@dataclass(slots=True)
class ModelCounters:
    """Counters of one model since the router started.

    ``num_running`` counts sequences from their arrival to their end. ``num_preparing`` counts those among
    them whose prompt is tokenized, ``num_held_back`` those that wait until the first sequence of their request has
    computed the prompt. ``num_finished`` and ``num_aborted`` count
    requests.
    """

    num_running: int = 0
    num_preparing: int = 0
    num_held_back: int = 0
    num_finished: int = 0
    num_aborted: int = 0
    num_restarts: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
