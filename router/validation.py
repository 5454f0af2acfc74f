"""From the wire's GenerateRequest to a request that can be served. Pure; every refusal names the field.

Two halves, since the prompt's length is known only after tokenizing: `check` and `complete`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from muxmesh.errors import InvalidRequest
from muxmesh.types import EngineRequest, KvFormat, Sampling, Standing, Stopping
from muxmesh.v1 import inference_pb2
from router.served_model import ServedModel, find_model

MAX_REQUEST_ID = 128
MAX_MESSAGES = 1024
MAX_STOP_TOKEN_IDS = 128
MAX_STOP_STRINGS = 64
MAX_STOP_STRING = 1024
ROLES = ("system", "user", "assistant")
MAX_TEMPERATURE = 100.0
LEAST_TEMPERATURE = 1e-5
"""Less is greedy: logits divided by it would overflow."""
MAX_PENALTY = 2.0
MAX_REPETITION_PENALTY = 100.0
MAX_BIAS = 100.0
MAX_LOGIT_BIAS = 1024
MAX_LOGPROBS = 20
MAX_SEQUENCES = 64
MAX_CACHE_SALT = 256
_SWAP_FORMATS: dict[int, KvFormat | None] = {
    inference_pb2.KV_SWAP_FORMAT_UNSPECIFIED: None,
    inference_pb2.KV_SWAP_FORMAT_RAW: "raw",
    inference_pb2.KV_SWAP_FORMAT_INT8: "int8",
}
_DEFAULTS = Sampling()
_PROMPTS = ("text", "token_ids", "chat")
_UNSUPPORTED: tuple[Literal["session_id"], ...] = ("session_id",)


@dataclass(frozen=True, slots=True)
class CheckedRequest:
    """A request whose fields are right, as far as they can be judged without the prompt's tokens."""

    wire: inference_pb2.GenerateRequest
    model: ServedModel
    sampling: Sampling
    num_sequences: int
    wants_text: bool
    wants_token_ids: bool


def check(
    wire: inference_pb2.GenerateRequest, models: Mapping[str, ServedModel], max_prompt_bytes: int, drawn_seed: int
) -> CheckedRequest:
    """Raises InvalidRequest or ModelNotFound. ``drawn_seed`` is used if the client gives none."""
    for path in _unknown_fields(wire, ""):
        raise InvalidRequest(path, "is a field that this mesh does not know")
    model = find_model(models, wire.model)
    check_request_id(wire.request_id)
    if wire.HasField("truncate_prompt_tokens") and not 0 < wire.truncate_prompt_tokens < model.max_model_len:
        raise InvalidRequest(
            "truncate_prompt_tokens",
            f"is {wire.truncate_prompt_tokens}; at least 1, and less than the context ({model.max_model_len} tokens)",
        )
    _check_prompt(wire, model, max_prompt_bytes)
    for name in _UNSUPPORTED:
        if wire.HasField(name):
            raise InvalidRequest(name, "is not supported by this mesh yet; leave it out")
    if wire.HasField("expected_output_tokens") and wire.expected_output_tokens < 1:
        raise InvalidRequest("expected_output_tokens", "is 0; at least 1, or unset")
    _check_stopping(wire.stopping, model)
    if wire.sampling.num_sequences > MAX_SEQUENCES:
        raise InvalidRequest("sampling.num_sequences", f"is {wire.sampling.num_sequences}; at most {MAX_SEQUENCES}")
    if len(wire.kv.cache_salt) > MAX_CACHE_SALT:
        raise InvalidRequest("kv.cache_salt", f"is {len(wire.kv.cache_salt)} characters; at most {MAX_CACHE_SALT}")
    if wire.kv.swap_format not in _SWAP_FORMATS:
        known = ", ".join(inference_pb2.KvSwapFormat.keys())
        raise InvalidRequest("kv.swap_format", f"is {wire.kv.swap_format}; one of: {known}")
    return CheckedRequest(
        wire=wire,
        model=model,
        sampling=_sampling(wire, model, drawn_seed),
        num_sequences=max(1, wire.sampling.num_sequences),
        wants_text=wire.response.output_text if wire.response.HasField("output_text") else True,
        wants_token_ids=wire.response.output_token_ids,
    )


def check_request_id(request_id: str) -> None:
    """Raises InvalidRequest unless it can stand in a header and in a log line."""
    if len(request_id) > MAX_REQUEST_ID or not all(" " <= character <= "~" for character in request_id):
        raise InvalidRequest("request_id", f"must be at most {MAX_REQUEST_ID} printable ASCII characters")


def complete(
    checked: CheckedRequest, request_id: str, prompt_token_ids: list[int], arrived_at_unix_s: float
) -> EngineRequest:
    """Adds the tokens. Raises InvalidRequest if they do not fit into the model's context."""
    wire, model = checked.wire, checked.model
    field = next(name for name in _PROMPTS if wire.HasField(name))  # type: ignore[arg-type] # one of three literals
    if wire.HasField("truncate_prompt_tokens"):
        prompt_token_ids = prompt_token_ids[-wire.truncate_prompt_tokens :]
    if not prompt_token_ids:
        raise InvalidRequest(field, "has no tokens")
    room = model.max_model_len - len(prompt_token_ids)
    if room < 1:
        raise InvalidRequest(
            field,
            f"is {len(prompt_token_ids)} tokens; the context holds {model.max_model_len}, at least 1 for the answer",
        )
    stopping = wire.stopping
    fits = max(1, model.capacity_tokens - len(prompt_token_ids))
    max_new_tokens = min(model.config.default_max_new_tokens, room, fits)
    if stopping.HasField("max_new_tokens"):
        max_new_tokens = stopping.max_new_tokens
        if max_new_tokens > room:
            raise InvalidRequest(
                "stopping.max_new_tokens",
                f"is {max_new_tokens}; the context holds {model.max_model_len} tokens and the prompt is "
                f"{len(prompt_token_ids)}, so at most {room}",
            )
    if stopping.min_new_tokens > max_new_tokens:
        raise InvalidRequest(
            "stopping.min_new_tokens", f"is {stopping.min_new_tokens}, more than max_new_tokens ({max_new_tokens})"
        )
    return EngineRequest(
        request_id=request_id,
        model=model.name,
        prompt_token_ids=tuple(prompt_token_ids),
        sampling=checked.sampling,
        stopping=Stopping(
            max_new_tokens=max_new_tokens,
            min_new_tokens=stopping.min_new_tokens,
            stop_token_ids=frozenset(stopping.stop_token_ids),
            eos_token_ids=frozenset() if stopping.ignore_eos else model.spec.eos_token_ids,
        ),
        standing=Standing(wire.priority, arrived_at_unix_s),
        cache_salt=wire.kv.cache_salt,
        bypass_prefix_cache=wire.kv.bypass_prefix_cache,
        kv_swap_format=_SWAP_FORMATS[wire.kv.swap_format],
    )


def _check_prompt(wire: inference_pb2.GenerateRequest, model: ServedModel, max_prompt_bytes: int) -> None:
    given = [name for name in _PROMPTS if wire.HasField(name)]  # type: ignore[arg-type] # three literals
    if len(given) != 1:
        found = f"{' and '.join(given)} are set" if given else "none is set"
        raise InvalidRequest(given[0] if given else "text", f"exactly one of {', '.join(_PROMPTS)} is needed; {found}")
    if wire.HasField("text"):
        if not wire.text:
            raise InvalidRequest("text", "is empty")
        _check_size("text", len(wire.text.encode()), max_prompt_bytes)
    elif wire.HasField("chat"):
        _check_chat(wire.chat, model, max_prompt_bytes)
    else:
        _check_prompt_ids(wire, model)


def _check_chat(chat: inference_pb2.ChatPrompt, model: ServedModel, max_prompt_bytes: int) -> None:
    if not chat.messages:
        raise InvalidRequest("chat.messages", "is empty")
    _check_count("chat.messages", len(chat.messages), MAX_MESSAGES)
    for index, message in enumerate(chat.messages):
        if message.role not in ROLES:
            raise InvalidRequest(f"chat.messages[{index}].role", f"is {message.role!r}; one of {', '.join(ROLES)}")
    if not any(message.content for message in chat.messages):
        raise InvalidRequest("chat.messages", "have no content")
    _check_size("chat.messages", sum(len(message.content.encode()) for message in chat.messages), max_prompt_bytes)


def _check_size(field: str, num_bytes: int, limit: int) -> None:
    if num_bytes > limit:
        raise InvalidRequest(field, f"is {num_bytes} bytes; at most {limit}")


def _check_count(field: str, count: int, limit: int) -> None:
    if count > limit:
        raise InvalidRequest(field, f"has {count} entries; at most {limit}")


def _check_prompt_ids(wire: inference_pb2.GenerateRequest, model: ServedModel) -> None:
    """Looks at no more ids than the context holds, however many came."""
    token_ids = wire.token_ids.ids
    if not token_ids:
        raise InvalidRequest("token_ids.ids", "is empty")
    first = 0
    if wire.HasField("truncate_prompt_tokens"):
        first = max(0, len(token_ids) - wire.truncate_prompt_tokens)
    if len(token_ids) - first >= model.max_model_len:
        raise InvalidRequest(
            "token_ids.ids",
            f"is {len(token_ids)} tokens; the context holds {model.max_model_len}, at least 1 for the answer",
        )
    _check_token_ids("token_ids.ids", token_ids[first:], model, first)


def _check_token_ids(field: str, token_ids: Sequence[int], model: ServedModel, first: int = 0) -> None:
    for index, token_id in enumerate(token_ids, first):
        if token_id >= model.spec.vocab_size:
            raise InvalidRequest(
                f"{field}[{index}]", f"token id {token_id} is unknown; {model.name} has {model.spec.vocab_size} tokens"
            )


def _check_stopping(stopping: inference_pb2.StoppingOptions, model: ServedModel) -> None:
    if stopping.HasField("max_new_tokens") and stopping.max_new_tokens == 0:
        raise InvalidRequest("stopping.max_new_tokens", "is 0; at least 1")
    _check_count("stopping.stop_token_ids", len(stopping.stop_token_ids), MAX_STOP_TOKEN_IDS)
    _check_token_ids("stopping.stop_token_ids", stopping.stop_token_ids, model)
    _check_count("stopping.stop_strings", len(stopping.stop_strings), MAX_STOP_STRINGS)
    for index, text in enumerate(stopping.stop_strings):
        if not text:
            raise InvalidRequest(f"stopping.stop_strings[{index}]", "is empty")
        if len(text) > MAX_STOP_STRING:
            raise InvalidRequest(
                f"stopping.stop_strings[{index}]", f"is {len(text)} characters; at most {MAX_STOP_STRING}"
            )


def _sampling(wire: inference_pb2.GenerateRequest, model: ServedModel, drawn_seed: int) -> Sampling:
    options, decoding, response = wire.sampling, wire.decoding, wire.response
    temperature = wire.temperature if wire.HasField("temperature") else _DEFAULTS.temperature
    top_p = options.top_p if options.HasField("top_p") else _DEFAULTS.top_p
    repetition_penalty = decoding.repetition_penalty or _DEFAULTS.repetition_penalty  # proto3: 0 is unset
    _check_range("temperature", temperature, 0.0, MAX_TEMPERATURE, "0 is greedy")
    if temperature < LEAST_TEMPERATURE:
        temperature = 0.0
    if not 0.0 < top_p <= 1.0:  # NaN too
        raise InvalidRequest("sampling.top_p", f"is {top_p}; more than 0 and at most 1")
    _check_range("sampling.min_p", options.min_p, 0.0, 1.0)
    _check_range("decoding.presence_penalty", decoding.presence_penalty, -MAX_PENALTY, MAX_PENALTY)
    _check_range("decoding.frequency_penalty", decoding.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)
    if not 0.0 < repetition_penalty <= MAX_REPETITION_PENALTY:
        raise InvalidRequest(
            "decoding.repetition_penalty",
            f"is {repetition_penalty}; more than 0 and at most {MAX_REPETITION_PENALTY:g}",
        )
    return Sampling(
        temperature=temperature,
        top_k=options.top_k,
        top_p=top_p,
        min_p=options.min_p,
        seed=options.seed if options.HasField("seed") else drawn_seed,
        presence_penalty=decoding.presence_penalty,
        frequency_penalty=decoding.frequency_penalty,
        repetition_penalty=repetition_penalty,
        logit_bias=_logit_bias(decoding, model),
        allowed_token_ids=_allowed_token_ids(wire, model),
        logprobs=_num_logprobs(response, "output_logprobs", model),
        prompt_logprobs=_num_logprobs(response, "prompt_logprobs", model),
    )


def _check_range(field: str, value: float, least: float, most: float, hint: str = "") -> None:
    if not least <= value <= most:  # NaN too
        raise InvalidRequest(field, f"is {value}; between {least:g} and {most:g}" + (f", {hint}" if hint else ""))


def _logit_bias(decoding: inference_pb2.DecodingOptions, model: ServedModel) -> tuple[tuple[int, float], ...]:
    _check_count("decoding.logit_bias", len(decoding.logit_bias), MAX_LOGIT_BIAS)
    for token_id, bias in sorted(decoding.logit_bias.items()):
        if token_id >= model.spec.vocab_size:
            raise InvalidRequest(
                f"decoding.logit_bias[{token_id}]", f"is unknown; {model.name} has {model.spec.vocab_size} tokens"
            )
        _check_range(f"decoding.logit_bias[{token_id}]", bias, -MAX_BIAS, MAX_BIAS)
    return tuple(sorted(decoding.logit_bias.items()))


def _allowed_token_ids(wire: inference_pb2.GenerateRequest, model: ServedModel) -> tuple[int, ...] | None:
    field, stopping = "decoding.allowed_token_ids.ids", wire.stopping
    if not wire.decoding.HasField("allowed_token_ids"):
        return None
    allowed = sorted(set(wire.decoding.allowed_token_ids.ids))
    if not allowed:
        raise InvalidRequest(field, "is empty; leave allowed_token_ids out to allow all")
    _check_token_ids(field, allowed, model)
    ending = set(stopping.stop_token_ids) | (set() if stopping.ignore_eos else model.spec.eos_token_ids)
    if stopping.min_new_tokens > 1 and ending.issuperset(allowed):
        raise InvalidRequest(
            field, f"holds only tokens that end the answer, and min_new_tokens is {stopping.min_new_tokens}"
        )
    return tuple(allowed)


def _num_logprobs(
    response: inference_pb2.ResponseOptions, name: Literal["output_logprobs", "prompt_logprobs"], model: ServedModel
) -> int | None:
    if not response.HasField(name):
        return None
    count: int = getattr(response, name)
    if model.config.engine == "sim":
        raise InvalidRequest(f"response.{name}", "the sim engine has no probabilities; leave it out")
    if count > MAX_LOGPROBS:
        raise InvalidRequest(f"response.{name}", f"is {count}; at most {MAX_LOGPROBS} candidates")
    return count


def _unknown_fields(message: Message, path: str) -> Iterator[str]:
    unknown_fields: Any = UnknownFieldSet(message)
    for unknown in unknown_fields:
        yield f"{path}(number {unknown.field_number})"
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        for inner in value if field.is_repeated else (value,):
            yield from _unknown_fields(inner, f"{path}{field.name}.")
