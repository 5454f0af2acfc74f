"""Checks a `GenerationRequest` and resolves it to the `EngineRequest` that workers compute. Pure.

There are two steps, `validate` and `resolve`, since the prompt's length is known only after tokenizing. Each error
names the field by its path in `muxmesh.v1.GenerateRequest`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from muxmesh.errors import InvalidRequest, PermissionDenied
from muxmesh.quoting import quoted
from muxmesh.types import MAX_REPETITION_PENALTY, MAX_TEMPERATURE, EngineRequest, Sampling, SchedulingState, Stopping
from router.generation import ChatPrompt, GenerationRequest, Prompt, StoppingOptions, TextPrompt, TokensPrompt
from router.served_models import ModelLimits, ServedModel

MAX_REQUEST_ID = 128
MAX_MESSAGES = 1024
MAX_STOP_TOKEN_IDS = 128
MAX_STOP_STRINGS = 64
MAX_STOP_STRING = 1024
ROLES = ("system", "user", "assistant")
MIN_TEMPERATURE = 1e-5
"""A lower temperature is greedy: logits divided by it could overflow."""
MAX_PENALTY = 2.0
MAX_BIAS = 100.0
MAX_LOGIT_BIAS = 1024
MAX_LOGPROBS = 20
MAX_SEQUENCES = 64
MAX_SEED = (1 << 63) - 1
MAX_CACHE_SALT = 256
_PROMPT_FIELDS = {TextPrompt: "text", TokensPrompt: "token_ids.ids", ChatPrompt: "chat.messages"}


def validate(request: GenerationRequest, model: ServedModel, max_prompt_bytes: int) -> None:
    """Raises InvalidRequest for the first invalid field. Only `resolve` finds a text too long for the context."""
    _check_request_id(request.request_id)
    truncate = request.truncate_prompt_tokens
    if truncate is not None and not 0 < truncate < model.limits.max_model_len:
        raise InvalidRequest(
            "truncate_prompt_tokens",
            f"is {truncate}; at least 1, and less than the context ({model.limits.max_model_len} tokens)",
        )
    if request.prompt == TextPrompt(""):
        raise InvalidRequest("text", "is empty")
    check_prompt(request.prompt, model, max_prompt_bytes, truncate)
    if request.expected_output_tokens is not None and request.expected_output_tokens < 1:
        raise InvalidRequest("expected_output_tokens", f"is {request.expected_output_tokens}; at least 1, or unset")
    _check_stopping(request, model)
    if request.seed is not None and not 0 <= request.seed <= MAX_SEED:
        raise InvalidRequest("sampling.seed", f"is {request.seed}; at least 0, or unset for a random one")
    check_priority(request)
    if not 1 <= request.num_sequences <= MAX_SEQUENCES:
        raise InvalidRequest(
            "sampling.num_sequences", f"is {request.num_sequences}; at least 1, at most {MAX_SEQUENCES}"
        )
    if len(request.cache_salt) > MAX_CACHE_SALT:
        raise InvalidRequest("kv.cache_salt", f"is {len(request.cache_salt)} characters; at most {MAX_CACHE_SALT}")
    _check_sampling(request, model)


def _check_request_id(request_id: str) -> None:
    """Raises InvalidRequest for an id that cannot be sent as a header or logged in a line."""
    if len(request_id) > MAX_REQUEST_ID:
        raise InvalidRequest("request_id", f"is {len(request_id)} characters; at most {MAX_REQUEST_ID}")
    for index, character in enumerate(request_id):
        if not " " <= character <= "~":
            raise InvalidRequest(
                "request_id", f"has U+{ord(character):04X} at index {index}; printable ASCII characters only"
            )


def resolve(
    request: GenerationRequest, model: ServedModel, token_ids: Sequence[int], seed: int, arrived_at_unix_s: float
) -> EngineRequest:
    """Returns the request with its prompt's tokens and all defaults filled in.

    ``seed`` is used if the request has none. Raises InvalidRequest if prompt and output exceed the model's context, or
    the prompt has a token that the model does not know.
    """
    field = _PROMPT_FIELDS[type(request.prompt)]
    if request.truncate_prompt_tokens is not None:
        token_ids = token_ids[-request.truncate_prompt_tokens :]
    if not token_ids:
        raise InvalidRequest(field, "has no tokens")
    check_prompt_length(field, len(token_ids), model.limits)
    if not isinstance(request.prompt, TokensPrompt):  # whose ids `validate` has checked
        _check_tokenizer_ids(field, token_ids, model)
    return EngineRequest(
        request_id=request.request_id,
        model=model.name,
        prompt_token_ids=tuple(token_ids),
        sampling=_resolved_sampling(request, model, seed),
        stopping=_stopping_of_tenant(request, model.limits, field, len(token_ids)),
        scheduling=SchedulingState(check_priority(request), arrived_at_unix_s),
        tenant=request.tenant.tenant_id,
        tenant_weight=request.tenant.weight,
        cache_salt=request.cache_salt,
        bypass_prefix_cache=request.bypass_prefix_cache,
        kv_swap_format=request.kv_swap_format,
    )


def check_priority(request: GenerationRequest) -> int:
    """The priority of a request; raises PermissionDenied if its tenant may not ask for it.

    Of a request with priority 0, which is also what one without has, it is the best that the tenant may ask for.
    """
    best = request.tenant.limits.best_priority
    if best is None or request.priority >= best:
        return request.priority
    if request.priority == 0:
        return best
    raise PermissionDenied(
        f"priority: is {request.priority}; tenant {request.tenant.name} may ask for {best} or a higher number, which "
        "is later"
    )


def _stopping_of_tenant(
    request: GenerationRequest, limits: ModelLimits, field: str, num_prompt_tokens: int
) -> Stopping:
    """When an output ends, so that the request keeps to the longest one that its tenant may send.

    A default length is cut to it. Raises InvalidRequest for one that the client has named, or without any left.
    """
    most = request.tenant.limits.max_request_tokens
    options = request.stopping
    if most is None:
        return resolve_stopping(options, limits, num_prompt_tokens)
    per_sequence = (most - num_prompt_tokens) // request.num_sequences
    whose = f"requests of tenant {request.tenant.name} have at most {most} tokens with all outputs"
    if per_sequence < 1:
        raise InvalidRequest(field, f"is {num_prompt_tokens} tokens; {whose}, at least 1 for each output")
    if options.max_new_tokens is not None and options.max_new_tokens > per_sequence:
        raise InvalidRequest(
            "stopping.max_new_tokens",
            f"is {options.max_new_tokens}; {whose} and the prompt is {num_prompt_tokens}, so at most {per_sequence}",
        )
    stopping = resolve_stopping(options, limits, num_prompt_tokens)
    if stopping.min_new_tokens > per_sequence:
        raise InvalidRequest(
            "stopping.min_new_tokens", f"is {stopping.min_new_tokens}; {whose}, so at most {per_sequence}"
        )
    return replace(stopping, max_new_tokens=min(stopping.max_new_tokens, per_sequence))


def check_prompt_length(field: str, num_tokens: int, limits: ModelLimits) -> None:
    """Raises InvalidRequest for ``field`` if its tokens leave no room for an output."""
    if num_tokens >= limits.max_model_len:
        raise InvalidRequest(
            field, f"is {num_tokens} tokens; the context holds {limits.max_model_len}, at least 1 for the output"
        )


def check_tokenized(prompt: Prompt, num_tokens: int, most: int) -> None:
    """Raises InvalidRequest for a prompt of more than ``most`` tokens."""
    if num_tokens > most:
        raise InvalidRequest(_PROMPT_FIELDS[type(prompt)], f"is {num_tokens} tokens; at most {most} are listed")


def _resolved_sampling(request: GenerationRequest, model: ServedModel, seed: int) -> Sampling:
    sampling = model.sampling_defaults.applied_to(request.sampling, request.unset_sampling)
    allowed = sampling.allowed_token_ids
    return replace(
        sampling,
        temperature=0.0 if sampling.temperature < MIN_TEMPERATURE else sampling.temperature,
        seed=seed if request.seed is None else request.seed,
        logit_bias=tuple(sorted(sampling.logit_bias)),
        allowed_token_ids=None if allowed is None else tuple(sorted(set(allowed))),
    )


def resolve_stopping(options: StoppingOptions, limits: ModelLimits, num_prompt_tokens: int) -> Stopping:
    """Returns when the output ends. ``num_prompt_tokens`` is less than the context.

    Raises InvalidRequest if ``max_new_tokens`` exceeds the rest of the context, or ``min_new_tokens`` exceeds
    ``max_new_tokens``.
    """
    context_left = limits.max_model_len - num_prompt_tokens
    max_new_tokens = options.max_new_tokens
    if max_new_tokens is None:
        pool_left = max(1, limits.capacity_tokens - num_prompt_tokens)
        max_new_tokens = min(limits.default_max_new_tokens, context_left, pool_left)
    elif max_new_tokens > context_left:
        raise InvalidRequest(
            "stopping.max_new_tokens",
            f"is {max_new_tokens}; the context holds {limits.max_model_len} tokens and the prompt is "
            f"{num_prompt_tokens}, so at most {context_left}",
        )
    if options.min_new_tokens > max_new_tokens:
        raise InvalidRequest(
            "stopping.min_new_tokens", f"is {options.min_new_tokens}, more than max_new_tokens ({max_new_tokens})"
        )
    return Stopping(
        max_new_tokens=max_new_tokens,
        min_new_tokens=options.min_new_tokens,
        stop_token_ids=frozenset(options.stop_token_ids),
        eos_token_ids=frozenset() if options.ignore_eos else limits.eos_token_ids,
    )


def check_prompt(prompt: Prompt, model: ServedModel, max_prompt_bytes: int, truncate: int | None = None) -> None:
    """Raises InvalidRequest for a prompt that is too long to be tokenized, or has what the model does not know.

    ``truncate``: only that many tokens at the end are used.
    """
    if isinstance(prompt, TextPrompt):
        _check_size("text", len(prompt.text.encode()), max_prompt_bytes)
    elif isinstance(prompt, ChatPrompt):
        _check_chat(prompt, max_prompt_bytes)
    else:
        _check_prompt_ids(prompt.token_ids, truncate, model)


def _check_chat(chat: ChatPrompt, max_prompt_bytes: int) -> None:
    if not chat.messages:
        raise InvalidRequest("chat.messages", "is empty")
    check_count("chat.messages", len(chat.messages), MAX_MESSAGES)
    for index, message in enumerate(chat.messages):
        if message.role not in ROLES:
            raise InvalidRequest(
                f"chat.messages[{index}].role", f"is {quoted(message.role)}; one of {', '.join(ROLES)}"
            )
    if not any(message.content for message in chat.messages):
        raise InvalidRequest("chat.messages", "have no content")
    _check_size("chat.messages", sum(len(message.content.encode()) for message in chat.messages), max_prompt_bytes)


def _check_size(field: str, num_bytes: int, limit: int) -> None:
    if num_bytes > limit:
        raise InvalidRequest(field, f"is {num_bytes} bytes; at most {limit}")


def check_count(field: str, count: int, limit: int) -> None:
    """Raises InvalidRequest for too many entries. An API may call it before it converts them."""
    if count > limit:
        raise InvalidRequest(field, f"has {count} entries; at most {limit}")


def _check_prompt_ids(token_ids: Sequence[int], truncate: int | None, model: ServedModel) -> None:
    """Checks the ids that are left after truncation: fewer than the context holds, however long the prompt is."""
    if not token_ids:
        raise InvalidRequest("token_ids.ids", "is empty")
    first = 0 if truncate is None else max(0, len(token_ids) - truncate)
    check_prompt_length("token_ids.ids", len(token_ids) - first, model.limits)
    check_token_ids("token_ids.ids", token_ids[first:], model, first)


def check_token_ids(field: str, token_ids: Sequence[int], model: ServedModel, first: int = 0) -> None:
    """Raises InvalidRequest for the first id that the model does not know. ``first``: the index of the first id."""
    if not token_ids or 0 <= min(token_ids) <= max(token_ids) < model.spec.vocab_size:
        return
    for index, token_id in enumerate(token_ids, first):
        if not 0 <= token_id < model.spec.vocab_size:
            raise InvalidRequest(
                f"{field}[{index}]", f"token id {token_id} is unknown; {model.name} has {model.spec.vocab_size} tokens"
            )


def _check_tokenizer_ids(field: str, token_ids: Sequence[int], model: ServedModel) -> None:
    """Raises InvalidRequest if the tokenizer gave an id past the model's vocabulary: it may have more tokens."""
    largest = max(token_ids)
    if largest >= model.spec.vocab_size:
        raise InvalidRequest(
            field, f"has the token id {largest} of the tokenizer; {model.name} has {model.spec.vocab_size} tokens"
        )


def _check_stopping(request: GenerationRequest, model: ServedModel) -> None:
    options = request.stopping
    if options.max_new_tokens is not None and options.max_new_tokens < 1:
        raise InvalidRequest("stopping.max_new_tokens", f"is {options.max_new_tokens}; at least 1")
    check_count("stopping.stop_token_ids", len(options.stop_token_ids), MAX_STOP_TOKEN_IDS)
    check_token_ids("stopping.stop_token_ids", options.stop_token_ids, model)
    check_count("stopping.stop_strings", len(options.stop_strings), MAX_STOP_STRINGS)
    for index, text in enumerate(options.stop_strings):
        _check_stop_string(f"stopping.stop_strings[{index}]", text, request.output.skip_special_tokens, model)


def _check_stop_string(field: str, text: str, skip_special_tokens: bool, model: ServedModel) -> None:
    """A string of special tokens is refused if they have no text. One that contains them may be spelled by others."""
    if not text:
        raise InvalidRequest(field, "is empty")
    if len(text) > MAX_STOP_STRING:
        raise InvalidRequest(field, f"is {len(text)} characters; at most {MAX_STOP_STRING}")
    special = model.text.only_special_tokens(text) if skip_special_tokens else {}
    if special:
        raise InvalidRequest(
            field,
            f"is the special token {', '.join(map(quoted, special))}, which has no text in the output and never "
            f"matches; use stop_token_ids {list(special.values())}, or set response.skip_special_tokens to false",
        )


def _check_sampling(request: GenerationRequest, model: ServedModel) -> None:
    sampling = request.sampling
    _check_range("temperature", sampling.temperature, 0.0, MAX_TEMPERATURE, "0 is greedy")
    if not 0.0 < sampling.top_p <= 1.0:  # NaN too
        raise InvalidRequest("sampling.top_p", f"is {sampling.top_p}; more than 0 and at most 1")
    _check_range("sampling.min_p", sampling.min_p, 0.0, 1.0)
    _check_range("decoding.presence_penalty", sampling.presence_penalty, -MAX_PENALTY, MAX_PENALTY)
    _check_range("decoding.frequency_penalty", sampling.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)
    if not 0.0 < sampling.repetition_penalty <= MAX_REPETITION_PENALTY:
        raise InvalidRequest(
            "decoding.repetition_penalty",
            f"is {sampling.repetition_penalty}; more than 0 and at most {MAX_REPETITION_PENALTY:g}",
        )
    _check_logit_bias(sampling, model)
    _check_allowed_token_ids(request, model)
    _check_logprobs("output", sampling.logprobs, model)
    _check_logprobs("prompt", sampling.prompt_logprobs, model)


def _check_range(field: str, value: float, least: float, most: float, hint: str = "") -> None:
    if math.isnan(value) or not least <= value <= most:
        raise InvalidRequest(field, f"is {value}; between {least:g} and {most:g}" + (f", {hint}" if hint else ""))


def _check_logit_bias(sampling: Sampling, model: ServedModel) -> None:
    check_count("decoding.logit_bias", len(sampling.logit_bias), MAX_LOGIT_BIAS)
    for token_id, bias in sorted(sampling.logit_bias):
        if not 0 <= token_id < model.spec.vocab_size:
            raise InvalidRequest(
                f"decoding.logit_bias[{token_id}]",
                f"token id {token_id} is unknown; {model.name} has {model.spec.vocab_size} tokens",
            )
        _check_range(f"decoding.logit_bias[{token_id}]", bias, -MAX_BIAS, MAX_BIAS)


def _check_allowed_token_ids(request: GenerationRequest, model: ServedModel) -> None:
    field, stopping, allowed = "decoding.allowed_token_ids", request.stopping, request.sampling.allowed_token_ids
    if allowed is None:
        return
    if not allowed:
        raise InvalidRequest(field, "is empty: no token could be sampled")
    check_count(field, len(allowed), model.spec.vocab_size)
    check_token_ids(field, allowed, model)
    ending = set(stopping.stop_token_ids) | (set() if stopping.ignore_eos else model.spec.eos_token_ids)
    if stopping.min_new_tokens > 1 and ending.issuperset(allowed):
        raise InvalidRequest(
            field, f"allows only tokens that end the output, but min_new_tokens is {stopping.min_new_tokens}"
        )


def _check_logprobs(part: str, num_candidates: int | None, model: ServedModel) -> None:
    if num_candidates is None:
        return
    if model.config.engine == "sim":
        raise InvalidRequest(f"response.{part}_logprobs", "the sim engine has no log-probabilities; leave it out")
    if num_candidates > MAX_LOGPROBS:
        raise InvalidRequest(f"response.{part}_candidates.top_n", f"is {num_candidates}; at most {MAX_LOGPROBS}")
