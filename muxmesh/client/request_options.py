"""The options of a request: their names, types and meaning, and the field of the request message that each one sets.

An option that is left out, or None, is not sent, so that the default of the model or of the mesh applies. The client
checks only what the wire cannot carry; the router checks the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, TypedDict

from muxmesh.client.option_values import (
    MAX_UINT32,
    Convert,
    Unfit,
    converted,
    flag,
    list_of,
    mapping_of,
    number,
    text,
    whole,
)
from muxmesh.quoting import quoted
from muxmesh.types import KvFormat
from muxmesh.v1 import inference_pb2


class OutputOptions(TypedDict, total=False):
    """The options of `MeshClient.generate`. All are optional."""

    model: str | None
    """Name of the model. May be omitted if the mesh serves only one."""
    max_new_tokens: int | None
    """Longest output, in tokens. Default: as the model is configured."""
    min_new_tokens: int | None
    """No end-of-sequence token, stop token or stop string ends the output before this number of tokens."""
    temperature: float | None
    """0 is greedy. Default: the model's own, else 1, so outputs are sampled and differ."""
    top_k: int | None
    """Samples among the k most likely tokens; 0 and -1 are off. Default: the model's own, else off."""
    top_p: float | None
    """Samples among the most likely tokens that together have this probability, in (0, 1]; 1 is off.

    Default: the model's own, else 1.
    """
    min_p: float | None
    """Drops tokens less likely than this fraction of the most likely one, in [0, 1]; 0 is off.

    Default: the model's own, else 0.
    """
    presence_penalty: float | None
    """In [-2, 2]; 0 is off."""
    frequency_penalty: float | None
    """In [-2, 2]; 0 is off."""
    repetition_penalty: float | None
    """Above 0; 1 is off. Default: the model's own, else 1."""
    logit_bias: Mapping[int, float] | None
    """Token id to the number added to its logit, in [-100, 100]."""
    allowed_token_ids: Sequence[int] | None
    """Only these tokens are sampled."""
    seed: int | None
    """Reproduces an output. Default: the mesh draws one and reports it in ``prompt.seed``."""
    stop_strings: str | Sequence[str] | None
    """The output ends before the first of these texts."""
    stop_token_ids: Sequence[int] | None
    """The output ends with the first of these tokens."""
    include_stop_strings: bool | None
    """Keeps the stop string that ended the output in the text."""
    ignore_eos: bool | None
    """The model's end-of-sequence tokens do not end the output."""
    truncate_prompt_tokens: int | None
    """Keeps only the last N tokens of the prompt."""
    skip_special_tokens: bool | None
    """Leaves special tokens out of the text. Default: True."""
    logprobs: int | None
    """Log-probabilities of each output token, with this number of most likely candidates."""
    prompt_logprobs: int | None
    """The same for the tokens of the prompt."""
    cache_salt: str | None
    """Requests share cached prefixes only with requests of the same salt."""
    bypass_prefix_cache: bool | None
    """Computes every token of the prompt, cached or not."""
    kv_swap_format: KvFormat | None
    """Format of the sequence's KV while it is swapped out. Default: as the model is configured."""
    priority: int | None
    """Lower is sooner; 0 is the default."""
    expected_output_tokens: int | None
    """Your own estimate; its weight depends on how accurate earlier ones with the same ``cache_salt`` were."""
    explain_scheduling: bool | None
    """Fills ``prompt.scheduling`` and ``execution``."""
    request_id: str | None
    """Names the request in logs. Default: chosen by the mesh."""
    timeout_s: float | None
    """Deadline for the complete output, retries included, in seconds above 0. Default: none."""


class RequestOptions(OutputOptions, total=False):
    """The options of `MeshClient.stream` and `MeshClient.generate_many`."""

    num_sequences: int | None
    """Number of outputs for the prompt, which is computed once. Default: 1."""


@dataclass(frozen=True, slots=True)
class _Option:
    """Where an option goes in GenerateRequest: the part of the message, and its fields by name.

    An empty ``part`` is the request itself. ``fields`` raises `Unfit`.
    """

    part: str
    fields: Callable[[Any], dict[str, Any]]


def _field(part: str, name: str, convert: Convert) -> _Option:
    return _Option(part, lambda value: {name: convert(value)})


def _top_k(value: Any) -> int:
    try:
        return max(0, int(whole(-1, MAX_UINT32)(value)))
    except Unfit:
        raise Unfit(f"a whole number from 0 to {MAX_UINT32} is needed; -1 is off") from None


def _allowed_token_ids(value: Any) -> Any:
    token_ids = list_of(_UINT32)(value)
    if not token_ids:  # on the wire an empty list allows all
        raise Unfit("None allows all", "is empty: no token could be sampled")
    return token_ids


def _strings(value: Any) -> Any:
    return [text(value)] if isinstance(value, str) else list_of(text)(value)


def _logprobs(value: Any) -> dict[str, Any]:
    return {"output_logprobs": True, "output_candidates": _candidates(value)}


def _prompt_logprobs(value: Any) -> dict[str, Any]:
    return {"prompt_token_ids": True, "prompt_logprobs": True, "prompt_candidates": _candidates(value)}


def _candidates(value: Any) -> inference_pb2.CandidateTokens | None:
    count = _UINT32(value)
    return inference_pb2.CandidateTokens(top_n=count) if count else None


def _swap_format(value: Any) -> int:
    if not isinstance(value, str) or value not in ("raw", "int8"):
        raise Unfit("raw or int8 is needed")
    return inference_pb2.KvSwapFormat.Value(f"KV_SWAP_FORMAT_{value.upper()}")


_UINT32 = whole(0, MAX_UINT32)
_OPTIONS: dict[str, _Option] = {
    "model": _field("", "model", text),
    "request_id": _field("", "request_id", text),
    "temperature": _field("", "temperature", number),
    "truncate_prompt_tokens": _field("", "truncate_prompt_tokens", _UINT32),
    "priority": _field("", "priority", whole(-(1 << 31), (1 << 31) - 1)),
    "expected_output_tokens": _field("", "expected_output_tokens", whole(1, MAX_UINT32)),
    "num_sequences": _field("sampling", "num_sequences", whole(1, MAX_UINT32)),
    "top_k": _field("sampling", "top_k", _top_k),
    "top_p": _field("sampling", "top_p", number),
    "min_p": _field("sampling", "min_p", number),
    "seed": _field("sampling", "seed", whole(0, (1 << 63) - 1)),
    "presence_penalty": _field("decoding", "presence_penalty", number),
    "frequency_penalty": _field("decoding", "frequency_penalty", number),
    "repetition_penalty": _field("decoding", "repetition_penalty", number),
    "logit_bias": _field("decoding", "logit_bias", mapping_of(_UINT32, number)),
    "allowed_token_ids": _field("decoding", "allowed_token_ids", _allowed_token_ids),
    "max_new_tokens": _field("stopping", "max_new_tokens", whole(1, MAX_UINT32)),
    "min_new_tokens": _field("stopping", "min_new_tokens", _UINT32),
    "stop_token_ids": _field("stopping", "stop_token_ids", list_of(_UINT32)),
    "stop_strings": _field("stopping", "stop_strings", _strings),
    "include_stop_strings": _field("stopping", "include_stop_strings", flag),
    "ignore_eos": _field("stopping", "ignore_eos", flag),
    "skip_special_tokens": _field("response", "skip_special_tokens", flag),
    "logprobs": _Option("response", _logprobs),
    "prompt_logprobs": _Option("response", _prompt_logprobs),
    "explain_scheduling": _field("response", "scheduling", flag),
    "cache_salt": _field("kv", "cache_salt", text),
    "bypass_prefix_cache": _field("kv", "bypass_prefix_cache", flag),
    "kv_swap_format": _field("kv", "swap_format", _swap_format),
}
_NAMES_ELSEWHERE = {
    "max_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "n": "num_sequences",
    "num_predict": "max_new_tokens",
    "repeat_penalty": "repetition_penalty",
    "stop": "stop_strings",
    "timeout": "timeout_s",
}
"""Options of vLLM, OpenAI and Ollama that have another name here."""
_NOT_SENT = {"timeout_s"}
"""Options that concern the call and are no field of the message."""


def request_of(options: RequestOptions) -> inference_pb2.GenerateRequest:
    """Builds a request without a prompt. Raises InvalidRequest with the option's name, TypeError for one unknown."""
    _refuse_unknown(options)
    parts: dict[str, dict[str, Any]] = {"": {}, "response": {"output_token_ids": True}}
    for name, value in options.items():
        if value is None or name in _NOT_SENT:
            continue
        option = _OPTIONS[name]
        parts.setdefault(option.part, {}).update(converted(name, option.fields, value))
    fields: dict[str, Any] = {**parts.pop(""), **parts}
    return inference_pb2.GenerateRequest(**fields)


def _refuse_unknown(options: Mapping[str, object]) -> None:
    known = RequestOptions.__annotations__.keys()
    for name in options.keys() - known:
        same = _NAMES_ELSEWHERE.get(name)
        close = [same] if same else get_close_matches(name, known, n=1, cutoff=0.5)
        raise TypeError(
            f"{quoted(name)} is not an option of a request" + (f"; did you mean {close[0]!r}?" if close else "")
        )
