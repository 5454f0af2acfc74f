"""Converts the messages of muxmesh.v1.Inference to the router's own values and back. Pure.

A field that the mesh does not know or support is refused by its name, never ignored. Values are checked elsewhere
(`router.request_validation`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

from muxmesh.errors import InvalidRequest
from muxmesh.models.token_texts import TokenText
from muxmesh.types import Candidate, KvFormat, Sampling, TokenLogprobs
from muxmesh.v1 import inference_pb2
from router.api.unknown_fields import refuse_unknown_fields
from router.generation import (
    ChatMessage,
    ChatPrompt,
    FinishKind,
    GenerationRequest,
    OutputDelta,
    OutputFinish,
    OutputOptions,
    Prompt,
    PromptReport,
    StoppingOptions,
    TextPrompt,
    TokensPrompt,
)
from router.request_validation import MAX_LOGIT_BIAS, MAX_MESSAGES, check_count

_SWAP_FORMATS: dict[int, KvFormat | None] = {
    inference_pb2.KV_SWAP_FORMAT_UNSPECIFIED: None,
    inference_pb2.KV_SWAP_FORMAT_RAW: "raw",
    inference_pb2.KV_SWAP_FORMAT_INT8: "int8",
}
_DEFAULTS = Sampling()
_PROMPTS = ("text", "token_ids", "chat")
_UNSUPPORTED: tuple[Literal["session_id"], ...] = ("session_id",)
_FINISH_REASONS = {
    FinishKind.LENGTH: inference_pb2.FinishInfo.LENGTH,
    FinishKind.EOS: inference_pb2.FinishInfo.STOP,
    FinishKind.STOP_TOKEN: inference_pb2.FinishInfo.STOP,
    FinishKind.STOP_STRING: inference_pb2.FinishInfo.STOP,
}


def request_from_message(message: inference_pb2.GenerateRequest, request_id: str = "") -> GenerationRequest:
    """Converts ``message``; ``request_id`` is that of a message without one.

    Raises InvalidRequest for a field that a `GenerationRequest` cannot express.
    """
    check_message(message)
    prompt = _prompt(message)
    for name in _UNSUPPORTED:
        if message.HasField(name):
            raise InvalidRequest(name, "is not supported by this mesh yet; leave it out")
    if message.kv.swap_format not in _SWAP_FORMATS:
        known = ", ".join(inference_pb2.KvSwapFormat.keys())
        raise InvalidRequest("kv.swap_format", f"is {message.kv.swap_format}; one of: {known}")
    has_hint, truncates = message.HasField("expected_output_tokens"), message.HasField("truncate_prompt_tokens")
    return GenerationRequest(
        model=message.model,
        prompt=prompt,
        request_id=message.request_id or request_id,
        sampling=_sampling(message),
        unset_sampling=_unset_sampling(message),
        seed=message.sampling.seed if message.sampling.HasField("seed") else None,
        num_sequences=max(1, message.sampling.num_sequences),
        stopping=_stopping(message.stopping),
        output=_output(message.response),
        truncate_prompt_tokens=message.truncate_prompt_tokens if truncates else None,
        priority=message.priority,
        expected_output_tokens=message.expected_output_tokens if has_hint else None,
        cache_salt=message.kv.cache_salt,
        bypass_prefix_cache=message.kv.bypass_prefix_cache,
        kv_swap_format=_SWAP_FORMATS[message.kv.swap_format],
    )


def check_message(message: inference_pb2.GenerateRequest | inference_pb2.TokenizeRequest) -> None:
    """Raises InvalidRequest for a conversation of too many messages, and for a field that the mesh does not know."""
    check_count("chat.messages", len(message.chat.messages), MAX_MESSAGES)
    refuse_unknown_fields(message)


def message_from_delta(
    delta: OutputDelta, options: OutputOptions, texts: Mapping[int, TokenText]
) -> inference_pb2.GenerateResponse:
    """Converts ``delta``, without the parts that ``options`` exclude. ``texts``: the text of each token by its id."""
    message = inference_pb2.GenerateResponse()
    output, new = message.outputs, delta.new
    output.index, output.num_tokens = delta.index, len(new.token_ids)
    if options.text:
        output.text = new.text
    if options.token_ids:
        output.token_ids.extend(new.token_ids)
    _add_logprobs(output, new.logprobs, texts)
    if new.finish is not None:
        output.finish_info.CopyFrom(_finish_info(new.finish))
    if delta.prompt is not None:
        message.prompt_info.CopyFrom(_prompt_info(delta.prompt, options, texts))
    if delta.scheduling is not None:
        message.scheduling.CopyFrom(inference_pb2.SchedulingInfo(**dataclasses.asdict(delta.scheduling)))
    if delta.timings is not None:
        message.timings.CopyFrom(inference_pb2.RequestTimings(**dataclasses.asdict(delta.timings)))
    if delta.execution is not None:
        message.execution.CopyFrom(inference_pb2.ExecutionInfo(**dataclasses.asdict(delta.execution)))
    return message


def _prompt(message: inference_pb2.GenerateRequest) -> Prompt:
    given = [name for name in _PROMPTS if message.HasField(name)]  # type: ignore[arg-type] # three literals
    if len(given) != 1:
        found = f"{' and '.join(given)} are set" if given else "none is set"
        raise InvalidRequest(given[0] if given else "text", f"exactly one of {', '.join(_PROMPTS)} is needed; {found}")
    if message.HasField("text"):
        return TextPrompt(message.text)
    if message.HasField("token_ids"):
        return TokensPrompt(message.token_ids.ids)
    return chat_prompt(message.chat)


def chat_prompt(chat: inference_pb2.ChatPrompt) -> ChatPrompt:
    """Converts a conversation."""
    return ChatPrompt(tuple(ChatMessage(one.role, one.content) for one in chat.messages))


def _sampling(message: inference_pb2.GenerateRequest) -> Sampling:
    options, decoding, response = message.sampling, message.decoding, message.response
    check_count("decoding.logit_bias", len(decoding.logit_bias), MAX_LOGIT_BIAS)
    return Sampling(
        temperature=message.temperature if message.HasField("temperature") else _DEFAULTS.temperature,
        top_k=options.top_k,
        top_p=options.top_p if options.HasField("top_p") else _DEFAULTS.top_p,
        min_p=options.min_p,
        presence_penalty=decoding.presence_penalty,
        frequency_penalty=decoding.frequency_penalty,
        repetition_penalty=decoding.repetition_penalty
        if decoding.HasField("repetition_penalty")
        else _DEFAULTS.repetition_penalty,
        logit_bias=tuple(decoding.logit_bias.items()),
        allowed_token_ids=tuple(decoding.allowed_token_ids) or None,
        logprobs=_num_candidates(response, "output"),
        prompt_logprobs=_num_candidates(response, "prompt"),
    )


def _unset_sampling(message: inference_pb2.GenerateRequest) -> frozenset[str]:
    options, decoding = message.sampling, message.decoding
    is_set = {
        "temperature": message.HasField("temperature"),
        "top_k": options.HasField("top_k"),
        "top_p": options.HasField("top_p"),
        "min_p": options.HasField("min_p"),
        "repetition_penalty": decoding.HasField("repetition_penalty"),
    }
    return frozenset(name for name, present in is_set.items() if not present)


def _num_candidates(response: inference_pb2.ResponseOptions, part: Literal["prompt", "output"]) -> int | None:
    """Number of candidates at each position of a part; None if its log-probabilities are not requested."""
    wants = response.output_logprobs if part == "output" else response.prompt_logprobs
    if wants:
        return (response.output_candidates if part == "output" else response.prompt_candidates).top_n
    if response.HasField("output_candidates" if part == "output" else "prompt_candidates"):
        raise InvalidRequest(f"response.{part}_candidates", f"is set, but {part}_logprobs is not")
    return None


def _stopping(options: inference_pb2.StoppingOptions) -> StoppingOptions:
    return StoppingOptions(
        max_new_tokens=options.max_new_tokens if options.HasField("max_new_tokens") else None,
        min_new_tokens=options.min_new_tokens,
        stop_token_ids=options.stop_token_ids,
        stop_strings=options.stop_strings,
        include_stop_strings=options.include_stop_strings,
        ignore_eos=options.ignore_eos,
    )


def _output(options: inference_pb2.ResponseOptions) -> OutputOptions:
    return OutputOptions(
        text=options.output_text if options.HasField("output_text") else True,
        token_ids=options.output_token_ids,
        prompt_token_ids=options.prompt_token_ids,
        skip_special_tokens=options.skip_special_tokens if options.HasField("skip_special_tokens") else True,
        prompt_logprobs=options.prompt_logprobs,
        scheduling=options.scheduling,
    )


def _prompt_info(
    report: PromptReport, options: OutputOptions, texts: Mapping[int, TokenText]
) -> inference_pb2.PromptInfo:
    info = inference_pb2.PromptInfo(
        num_prompt_tokens=len(report.token_ids),
        token_ids=report.token_ids if options.prompt_token_ids else (),
        num_cached_tokens=report.num_cached_tokens,
        seed=report.seed,
        predicted_output_tokens=report.predicted_output_tokens,
    )
    if options.prompt_logprobs:
        first = TokenLogprobs(Candidate(report.token_ids[0], 0.0, 0))  # nothing predicts the first token
        _add_logprobs(info, (first, *report.logprobs), texts)
    return info


def _add_logprobs(
    target: inference_pb2.PromptInfo | inference_pb2.SequenceOutput,
    positions: Sequence[TokenLogprobs],
    texts: Mapping[int, TokenText],
) -> None:
    """Appends to the columns of log-probabilities."""
    for position in positions:
        chosen = position.chosen
        target.logprobs.append(chosen.logprob)
        target.ranks.append(chosen.rank)
        text = texts[chosen.token_id]
        target.token_texts.append(text.text)
        target.token_bytes.append(text.token_bytes)
        others = (candidate for candidate in position.top if candidate.token_id != chosen.token_id)
        target.candidate_tokens.add(tokens=[_token_info(candidate, texts[candidate.token_id]) for candidate in others])


def _token_info(candidate: Candidate, text: TokenText) -> inference_pb2.CandidateTokenInfo.TokenInfo:
    return inference_pb2.CandidateTokenInfo.TokenInfo(
        id=candidate.token_id,
        logprob=candidate.logprob,
        rank=candidate.rank,
        text=text.text,
        token_bytes=text.token_bytes,
    )


def _finish_info(finish: OutputFinish) -> inference_pb2.FinishInfo:
    info = inference_pb2.FinishInfo(
        num_output_tokens=finish.num_output_tokens, finish_reason=_FINISH_REASONS[finish.kind]
    )
    if finish.stop_string is not None:
        info.stop_string = finish.stop_string
    elif finish.token_id is not None:
        if finish.kind is FinishKind.EOS:
            info.eos_token_id = finish.token_id
        else:
            info.stop_token_id = finish.token_id
    return info
