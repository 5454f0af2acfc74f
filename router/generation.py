"""A request for output as the router knows it, and what the router gives back. Pure values; no wire format.

A door (`router.api`) turns its messages into a `GenerationRequest` and each `OutputDelta` into a message. Errors name a
field by its path in `muxmesh.v1.GenerateRequest`, the mesh's own vocabulary; a door with other names translates them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from muxmesh.types import KvFormat, Sampling, TokenLogprobs


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Text, taken as it is."""

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
    """A conversation, rendered by the model's own template."""

    messages: tuple[ChatMessage, ...]


Prompt = TextPrompt | TokensPrompt | ChatPrompt


@dataclass(frozen=True, slots=True)
class StoppingOptions:
    """When output ends. ``max_new_tokens`` None: the model's default, limited to what the context holds."""

    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    stop_token_ids: Sequence[int] = ()
    stop_strings: Sequence[str] = ()
    include_stop_strings: bool = False
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """What the client wants to receive."""

    text: bool = True
    token_ids: bool = False
    prompt_token_ids: bool = False
    skip_special_tokens: bool = True
    scheduling: bool = False


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What a client asks for. ``sampling.seed`` is replaced by ``seed``, or by a random one if that is None."""

    model: str
    prompt: Prompt
    request_id: str = ""
    sampling: Sampling = field(default_factory=Sampling)
    seed: int | None = None
    num_sequences: int = 1
    stopping: StoppingOptions = StoppingOptions()
    output: OutputOptions = OutputOptions()
    truncate_prompt_tokens: int | None = None
    priority: int = 0
    expected_output_tokens: int | None = None
    tenant: str = ""
    cache_salt: str = ""
    bypass_prefix_cache: bool = False
    kv_swap_format: KvFormat | None = None


class FinishKind(Enum):
    """Why output ended."""

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
    """What is new of one output sequence."""

    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish: OutputFinish | None = None


@dataclass(frozen=True, slots=True)
class PromptReport:
    """What is known of the prompt with the first delta."""

    token_ids: tuple[int, ...]
    num_cached_tokens: int
    seed: int
    predicted_output_tokens: int | None
    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class SchedulingReport:
    """Why a request was served when it was."""

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


@dataclass(frozen=True, slots=True)
class TimingsReport:
    """Times of a request in seconds, see `muxmesh.v1.RequestTimings`."""

    queue_s: float
    ttft_s: float
    e2e_s: float
    num_restarts: int
    router_s: float


@dataclass(frozen=True, slots=True)
class OutputDelta:
    """What is new of sequence ``index``; with the first delta of a request reports, with the last its timings."""

    index: int
    new: SequenceDelta
    prompt: PromptReport | None = None
    scheduling: SchedulingReport | None = None
    timings: TimingsReport | None = None


@dataclass(slots=True)
class ModelCounters:
    """Of one model since the router started. A sequence is running from its arrival on, and held back until the first
    sequence of its request has its prompt computed.
    """

    num_running: int = 0
    num_held_back: int = 0
    num_finished: int = 0
    num_aborted: int = 0
    num_restarts: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
