from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxmesh.errors import InvalidRequest
from muxmesh.models.sampling_defaults import SamplingDefaults
from muxmesh.tenants.tenant import Tenant
from muxmesh.types import EngineRequest, Sampling, SchedulingState, Stopping
from router.generation import (
    ChatMessage,
    ChatPrompt,
    GenerationRequest,
    OutputOptions,
    StoppingOptions,
    TextPrompt,
    TokensPrompt,
)
from router.request_validation import check_tokenized, resolve, resolve_stopping, validate
from router.served_models import ModelLimits
from tests.support.pipeline_parts import EOS, served_model

MODEL = served_model(max_model_len=100, default_max_new_tokens=20)
REQUEST = GenerationRequest("m", TextPrompt("hello"))
NAN, INF = float("nan"), float("inf")


def sampling(**changes: Any) -> GenerationRequest:
    return replace(REQUEST, sampling=Sampling(**changes))


def stopping(**changes: Any) -> GenerationRequest:
    return replace(REQUEST, stopping=StoppingOptions(**changes))


def text(prompt: str) -> GenerationRequest:
    return replace(REQUEST, prompt=TextPrompt(prompt))


def tokens(*token_ids: int, **changes: Any) -> GenerationRequest:
    return replace(REQUEST, prompt=TokensPrompt(token_ids), **changes)


def chat(*messages: tuple[str, str]) -> GenerationRequest:
    return replace(REQUEST, prompt=ChatPrompt(tuple(ChatMessage(*message) for message in messages)))


ACCEPTED = {
    "a request id of 128 characters": replace(REQUEST, request_id=" " + "~" * 127),
    "the largest text": text("x" * 2000),
    "a text over the context": text("x" * 150),
    "the longest token prompt": tokens(*[258] * 99),
    "a longer token prompt that is truncated": tokens(*[40] * 5000, truncate_prompt_tokens=99),
    "an unknown token that truncation removes": tokens(999, 40, 41, truncate_prompt_tokens=2),
    "1024 messages": chat(*[("user", "x")] * 1024),
    "the three roles": chat(("system", ""), ("user", "x"), ("assistant", "y")),
    "truncate to 1": replace(REQUEST, truncate_prompt_tokens=1),
    "truncate to the context less 1": replace(REQUEST, truncate_prompt_tokens=99),
    "a hint of 1": replace(REQUEST, expected_output_tokens=1),
    "the largest seed": replace(REQUEST, seed=2**63 - 1),
    "64 sequences": replace(REQUEST, num_sequences=64),
    "a salt of 256 characters": replace(REQUEST, cache_salt="é" * 256),
    "max_new_tokens 1": stopping(max_new_tokens=1),
    "128 stop tokens": stopping(stop_token_ids=[258] * 128),
    "a stop string that contains a special token, which other tokens may spell": stopping(stop_strings=["x<|eos|>"]),
    "a stop string that is a special token, which has text": replace(
        stopping(stop_strings=["<|eos|>"]), output=OutputOptions(skip_special_tokens=False)
    ),
    "a stop string of whitespace": stopping(stop_strings=["\n\n"]),
    "64 stop strings of 1024 characters": stopping(stop_strings=["x" * 1024] * 64),
    "temperature 0": sampling(temperature=0.0),
    "temperature 100": sampling(temperature=100.0),
    "top_p 1": sampling(top_p=1.0),
    "the least top_p": sampling(top_p=1e-9),
    "min_p 0": sampling(min_p=0.0),
    "min_p 1": sampling(min_p=1.0),
    "any top_k": sampling(top_k=2**32 - 1),
    "the least penalties": sampling(presence_penalty=-2.0, frequency_penalty=-2.0),
    "the largest penalties": sampling(presence_penalty=2.0, frequency_penalty=2.0, repetition_penalty=100.0),
    "1024 biases": sampling(logit_bias=tuple((token_id % 259, -100.0) for token_id in range(1024))),
    "the largest bias": sampling(logit_bias=((258, 100.0),)),
    "only the end is allowed": sampling(allowed_token_ids=(EOS,)),
    "20 candidates": sampling(logprobs=20, prompt_logprobs=20),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_value_at_its_bound_is_accepted(name: str) -> None:
    validate(ACCEPTED[name], MODEL, 2000)


END_ONLY = replace(sampling(allowed_token_ids=(EOS,)), stopping=StoppingOptions(min_new_tokens=2))
STOP_ONLY = replace(
    sampling(allowed_token_ids=(7, 8)),
    stopping=StoppingOptions(min_new_tokens=2, stop_token_ids=(8, 7), ignore_eos=True),
)
REFUSED: dict[str, tuple[GenerationRequest, str, str]] = {
    "request_id too long": (replace(REQUEST, request_id="x" * 129), "request_id", "is 129 characters; at most 128"),
    "request_id with a line end": (
        replace(REQUEST, request_id="a\n"),
        "request_id",
        "has U+000A at index 1; printable ASCII characters only",
    ),
    "request_id beyond ASCII": (replace(REQUEST, request_id="é"), "request_id", "has U+00E9 at index 0"),
    "empty text": (text(""), "text", "is empty"),
    "text of too many characters": (text("x" * 2001), "text", "is 2001 bytes; at most 2000"),
    "text of too many bytes": (text("é" * 1001), "text", "is 2002 bytes; at most 2000"),
    "no tokens": (tokens(), "token_ids.ids", "is empty"),
    "a token prompt that fills the context": (
        tokens(*[40] * 100),
        "token_ids.ids",
        "is 100 tokens; the context holds 100, at least 1 for the output",
    ),
    "an unknown prompt token": (
        tokens(40, 259),
        "token_ids.ids[1]",
        "token id 259 is unknown; m has 259 tokens",
    ),
    "a negative prompt token": (tokens(-1), "token_ids.ids[0]", "token id -1 is unknown"),
    "an unknown token after truncation": (
        tokens(40, 41, 999, truncate_prompt_tokens=1),
        "token_ids.ids[2]",
        "token id 999 is unknown",
    ),
    "no messages": (chat(), "chat.messages", "is empty"),
    "too many messages": (chat(*[("user", "x")] * 1025), "chat.messages", "has 1025 entries; at most 1024"),
    "an unknown role": (
        chat(("user", "x"), ("tool", "x")),
        "chat.messages[1].role",
        "is 'tool'; one of system, user, assistant",
    ),
    "messages without content": (chat(("user", ""), ("assistant", "")), "chat.messages", "have no content"),
    "messages of too many bytes": (
        chat(("user", "x" * 1000), ("user", "é" * 501)),
        "chat.messages",
        "is 2002 bytes; at most 2000",
    ),
    "truncate to 0": (
        replace(REQUEST, truncate_prompt_tokens=0),
        "truncate_prompt_tokens",
        "is 0; at least 1, and less than the context (100 tokens)",
    ),
    "truncate to the context": (
        replace(REQUEST, truncate_prompt_tokens=100),
        "truncate_prompt_tokens",
        "is 100; at least 1, and less than the context (100 tokens)",
    ),
    "a hint of 0": (
        replace(REQUEST, expected_output_tokens=0),
        "expected_output_tokens",
        "is 0; at least 1, or unset",
    ),
    "no sequences": (replace(REQUEST, num_sequences=0), "sampling.num_sequences", "is 0; at least 1, at most 64"),
    "too many sequences": (replace(REQUEST, num_sequences=65), "sampling.num_sequences", "is 65; at least 1, at most"),
    "a salt too long": (replace(REQUEST, cache_salt="x" * 257), "kv.cache_salt", "is 257 characters; at most 256"),
    "max_new_tokens 0": (stopping(max_new_tokens=0), "stopping.max_new_tokens", "is 0; at least 1"),
    "too many stop tokens": (
        stopping(stop_token_ids=[5] * 129),
        "stopping.stop_token_ids",
        "has 129 entries; at most 128",
    ),
    "an unknown stop token": (
        stopping(stop_token_ids=[5, 259]),
        "stopping.stop_token_ids[1]",
        "token id 259 is unknown; m has 259 tokens",
    ),
    "too many stop strings": (
        stopping(stop_strings=["x"] * 65),
        "stopping.stop_strings",
        "has 65 entries; at most 64",
    ),
    "an empty stop string": (stopping(stop_strings=["x", ""]), "stopping.stop_strings[1]", "is empty"),
    "a stop string too long": (
        stopping(stop_strings=["x", "y", "z" * 1025]),
        "stopping.stop_strings[2]",
        "is 1025 characters; at most 1024",
    ),
    "a stop string that is a special token": (
        stopping(stop_strings=["x", "<|eos|>"]),
        "stopping.stop_strings[1]",
        "is the special token '<|eos|>', which has no text in the output and never matches; "
        "use stop_token_ids [0], or set response.skip_special_tokens to false",
    ),
    "a stop string of special tokens and whitespace": (
        stopping(stop_strings=["\n<|eos|>\n<|start|>"]),
        "stopping.stop_strings[0]",
        "is the special token '<|eos|>', '<|start|>', which has no text in the output and never matches; "
        "use stop_token_ids [0, 1], or set response.skip_special_tokens to false",
    ),
    "temperature below 0": (sampling(temperature=-0.5), "temperature", "is -0.5; between 0 and 100, 0 is greedy"),
    "temperature over 100": (sampling(temperature=100.5), "temperature", "is 100.5; between 0 and 100, 0 is greedy"),
    "temperature NaN": (sampling(temperature=NAN), "temperature", "is nan; between 0 and 100"),
    "temperature infinite": (sampling(temperature=INF), "temperature", "is inf; between 0 and 100"),
    "top_p 0": (sampling(top_p=0.0), "sampling.top_p", "is 0.0; more than 0 and at most 1"),
    "top_p over 1": (sampling(top_p=1.5), "sampling.top_p", "is 1.5; more than 0 and at most 1"),
    "top_p NaN": (sampling(top_p=NAN), "sampling.top_p", "is nan; more than 0 and at most 1"),
    "min_p below 0": (sampling(min_p=-0.5), "sampling.min_p", "is -0.5; between 0 and 1"),
    "min_p over 1": (sampling(min_p=1.5), "sampling.min_p", "is 1.5; between 0 and 1"),
    "min_p NaN": (sampling(min_p=NAN), "sampling.min_p", "is nan; between 0 and 1"),
    "presence_penalty": (
        sampling(presence_penalty=2.5),
        "decoding.presence_penalty",
        "is 2.5; between -2 and 2",
    ),
    "frequency_penalty": (
        sampling(frequency_penalty=-2.5),
        "decoding.frequency_penalty",
        "is -2.5; between -2 and 2",
    ),
    "frequency_penalty NaN": (sampling(frequency_penalty=NAN), "decoding.frequency_penalty", "is nan"),
    "repetition_penalty 0": (
        sampling(repetition_penalty=0.0),
        "decoding.repetition_penalty",
        "is 0.0; more than 0 and at most 100",
    ),
    "repetition_penalty over 100": (sampling(repetition_penalty=101.0), "decoding.repetition_penalty", "is 101.0"),
    "repetition_penalty NaN": (sampling(repetition_penalty=NAN), "decoding.repetition_penalty", "is nan"),
    "too many biases": (
        sampling(logit_bias=((5, 1.0),) * 1025),
        "decoding.logit_bias",
        "has 1025 entries; at most 1024",
    ),
    "a bias of an unknown token": (
        sampling(logit_bias=((5, 1.0), (259, 1.0))),
        "decoding.logit_bias[259]",
        "token id 259 is unknown; m has 259 tokens",
    ),
    "a bias too large": (
        sampling(logit_bias=((5, 100.5),)),
        "decoding.logit_bias[5]",
        "is 100.5; between -100 and 100",
    ),
    "a bias NaN": (sampling(logit_bias=((5, NAN),)), "decoding.logit_bias[5]", "is nan; between -100 and 100"),
    "no allowed tokens": (
        sampling(allowed_token_ids=()),
        "decoding.allowed_token_ids",
        "is empty: no token could be sampled",
    ),
    "an unknown allowed token": (
        sampling(allowed_token_ids=(300, 5)),
        "decoding.allowed_token_ids[0]",
        "token id 300 is unknown; m has 259 tokens",
    ),
    "allowed tokens that only end the output": (
        END_ONLY,
        "decoding.allowed_token_ids",
        "allows only tokens that end the output, but min_new_tokens is 2",
    ),
    "allowed tokens that are all stop tokens": (
        STOP_ONLY,
        "decoding.allowed_token_ids",
        "allows only tokens that end the output, but min_new_tokens is 2",
    ),
    "logprobs": (sampling(logprobs=21), "response.output_candidates.top_n", "is 21; at most 20"),
    "prompt_logprobs": (sampling(prompt_logprobs=21), "response.prompt_candidates.top_n", "is 21; at most 20"),
    "a negative seed": (replace(REQUEST, seed=-1), "sampling.seed", "is -1; at least 0, or unset for a random one"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_value_beyond_its_bound_is_refused_by_the_name_of_its_field(name: str) -> None:
    request, field, problem = REFUSED[name]
    with pytest.raises(InvalidRequest) as caught:
        validate(request, MODEL, 2000)
    assert caught.value.field == field
    assert caught.value.problem.startswith(problem)


UNBOUNDED = {
    GenerationRequest: {
        "model",
        "output",
        "priority",
        "tenant",
        "bypass_prefix_cache",
        "kv_swap_format",
        "unset_sampling",
        "ticket",
        "deadline_s",
    },
    StoppingOptions: {"include_stop_strings", "ignore_eos", "min_new_tokens"},
    Sampling: {"seed", "top_k"},
}
"""Fields that `validate` accepts with any value. `resolve` checks ``min_new_tokens``."""


@pytest.mark.parametrize("kind", UNBOUNDED)
def test_every_field_of_a_request_is_refused_in_some_case_or_has_no_bound(kind: type[Any]) -> None:
    def part(request: GenerationRequest) -> Any:
        return {GenerationRequest: request, StoppingOptions: request.stopping, Sampling: request.sampling}[kind]

    refused = [part(request) for request, _, _ in REFUSED.values()]
    varied = {
        one.name
        for one in fields(kind)
        if any(getattr(p, one.name) != getattr(part(REQUEST), one.name) for p in refused)
    }
    names = {one.name for one in fields(kind)}
    assert names - varied <= UNBOUNDED[kind]
    assert UNBOUNDED[kind] <= names


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
def test_the_sim_engine_refuses_log_probabilities(name: str) -> None:
    with pytest.raises(InvalidRequest, match="_logprobs: the sim engine has no log-probabilities; leave it out"):
        validate(sampling(**{name: 0}), served_model(engine="sim"), 2000)


def test_the_first_of_several_errors_is_reported() -> None:
    with pytest.raises(InvalidRequest, match=r"^text: is empty"):
        validate(replace(text(""), stopping=StoppingOptions(max_new_tokens=0)), MODEL, 2000)


def resolved(request: GenerationRequest, *token_ids: int, seed: int = 5) -> EngineRequest:
    return resolve(request, MODEL, token_ids or (40, 41, 42), seed, 1000.0)


def test_every_field_is_passed_on_to_the_workers() -> None:
    request = replace(
        REQUEST,
        request_id="r",
        priority=-3,
        tenant=Tenant("name", "t", 2.5),
        cache_salt="s",
        bypass_prefix_cache=True,
        kv_swap_format="int8",
    )
    assert resolved(request) == EngineRequest(
        request_id="r",
        model="m",
        prompt_token_ids=(40, 41, 42),
        sampling=Sampling(seed=5),
        stopping=Stopping(20, eos_token_ids=frozenset({EOS})),
        scheduling=SchedulingState(-3, 1000.0),
        tenant="t",
        tenant_weight=2.5,
        cache_salt="s",
        bypass_prefix_cache=True,
        kv_swap_format="int8",
    )


@pytest.mark.parametrize(("given_seed", "used"), [(None, 5), (0, 0), (2**63 - 1, 2**63 - 1)])
def test_the_client_s_seed_is_used_and_otherwise_the_router_s(given_seed: int | None, used: int) -> None:
    request = replace(REQUEST, seed=given_seed, sampling=Sampling(seed=99))
    assert resolved(request).sampling.seed == used


def test_the_model_s_defaults_replace_what_the_client_left_unset() -> None:
    model = served_model(defaults=SamplingDefaults(temperature=0.0, top_k=20, repetition_penalty=1.1))
    request = replace(sampling(top_p=0.5), unset_sampling=frozenset({"temperature", "repetition_penalty"}))
    assert resolve(request, model, (40,), 5, 0.0).sampling == Sampling(
        temperature=0.0, top_p=0.5, repetition_penalty=1.1, seed=5
    )


@pytest.mark.parametrize(("temperature", "used"), [(0.0, 0.0), (9.9e-6, 0.0), (1e-5, 1e-5), (1.5, 1.5)])
def test_a_tiny_temperature_is_greedy(temperature: float, used: float) -> None:
    assert resolved(sampling(temperature=temperature)).sampling.temperature == used


def test_token_sets_are_sorted_and_unique() -> None:
    result = resolved(sampling(logit_bias=((9, 1.0), (3, 2.0)), allowed_token_ids=(9, 3, 9))).sampling
    assert (result.logit_bias, result.allowed_token_ids) == (((3, 2.0), (9, 1.0)), (3, 9))


@pytest.mark.parametrize(("limit", "kept"), [(None, (1, 2, 3)), (1, (3,)), (2, (2, 3)), (9, (1, 2, 3))])
def test_truncation_keeps_the_last_tokens(limit: int | None, kept: tuple[int, ...]) -> None:
    assert resolved(replace(REQUEST, truncate_prompt_tokens=limit), 1, 2, 3).prompt_token_ids == kept


@pytest.mark.parametrize(
    ("request_", "field"),
    [(REQUEST, "text"), (tokens(40), r"token_ids\.ids"), (chat(("user", "x")), r"chat\.messages")],
)
def test_a_prompt_that_tokenizes_to_nothing_or_to_too_much_is_refused(request_: GenerationRequest, field: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{field}: has no tokens"):
        resolve(request_, MODEL, [], 5, 0.0)
    with pytest.raises(InvalidRequest, match=f"^{field}: is 100 tokens; the context holds 100, at least 1 for the out"):
        resolve(request_, MODEL, [40] * 100, 5, 0.0)


@pytest.mark.parametrize("request_", [text("hi"), REQUEST])
def test_a_token_of_the_tokenizer_that_the_model_does_not_have_is_refused(request_: GenerationRequest) -> None:
    """A kernel would read the memory behind the embeddings."""
    size = MODEL.spec.vocab_size
    assert resolve(request_, MODEL, [40, size - 1], 5, 0.0).prompt_token_ids == (40, size - 1)
    with pytest.raises(InvalidRequest, match=rf"has the token id {size} of the tokenizer; m has {size} tokens"):
        resolve(request_, MODEL, [40, size, 41], 5, 0.0)
    truncated = replace(request_, truncate_prompt_tokens=1)
    assert resolve(truncated, MODEL, [size, 41], 5, 0.0).prompt_token_ids == (41,), "what is cut does not matter"


@pytest.mark.parametrize(
    ("num_prompt_tokens", "capacity_tokens", "expected"), [(10, 1000, 20), (90, 1000, 10), (10, 25, 15), (30, 25, 1)]
)
def test_the_default_length_is_limited_by_the_context_and_the_pool(
    num_prompt_tokens: int, capacity_tokens: int, expected: int
) -> None:
    limits = ModelLimits(100, capacity_tokens, 20, frozenset())
    assert resolve_stopping(StoppingOptions(), limits, num_prompt_tokens).max_new_tokens == expected


def test_a_length_that_exceeds_the_context_is_refused_even_with_a_small_pool() -> None:
    limits = ModelLimits(100, 5, 20, frozenset())
    assert resolve_stopping(StoppingOptions(max_new_tokens=90), limits, 10).max_new_tokens == 90
    with pytest.raises(InvalidRequest) as caught:
        resolve_stopping(StoppingOptions(max_new_tokens=91), limits, 10)
    assert caught.value.field == "stopping.max_new_tokens"
    assert caught.value.problem == "is 91; the context holds 100 tokens and the prompt is 10, so at most 90"


@pytest.mark.parametrize("max_new_tokens", [None, 20])
def test_a_least_length_over_the_largest_is_refused(max_new_tokens: int | None) -> None:
    options = StoppingOptions(max_new_tokens=max_new_tokens, min_new_tokens=20)
    assert resolve_stopping(options, MODEL.limits, 10).min_new_tokens == 20
    with pytest.raises(InvalidRequest, match=r"^stopping\.min_new_tokens: is 21, more than max_new_tokens \(20\)"):
        resolve_stopping(replace(options, min_new_tokens=21), MODEL.limits, 10)


def test_ignore_eos_keeps_the_client_s_stop_tokens() -> None:
    options = StoppingOptions(stop_token_ids=[7, 8, 7])
    assert resolve_stopping(options, MODEL.limits, 10).eos_token_ids == {EOS}
    ignoring = resolve_stopping(replace(options, ignore_eos=True), MODEL.limits, 10)
    assert (ignoring.eos_token_ids, ignoring.stop_token_ids) == (frozenset(), frozenset({7, 8}))


@given(st.integers(1, 99), st.integers(1, 200), st.integers(1, 200), st.none() | st.integers(1, 200))
def test_prompt_and_output_always_fit_the_context(
    num_prompt_tokens: int, capacity_tokens: int, default: int, max_new_tokens: int | None
) -> None:
    limits = ModelLimits(100, capacity_tokens, default, frozenset())
    try:
        result = resolve_stopping(StoppingOptions(max_new_tokens), limits, num_prompt_tokens)
    except InvalidRequest:
        assert max_new_tokens is not None and num_prompt_tokens + max_new_tokens > 100
    else:
        assert 1 <= result.max_new_tokens <= 100 - num_prompt_tokens


@pytest.mark.parametrize(
    ("prompt", "field"), [(TextPrompt("x"), "text"), (ChatPrompt((ChatMessage("user", "x"),)), "chat.messages")]
)
def test_a_prompt_of_more_tokens_than_can_be_listed_is_named_by_its_field(
    prompt: TextPrompt | ChatPrompt, field: str
) -> None:
    check_tokenized(prompt, 100, 100)
    with pytest.raises(InvalidRequest, match=rf"^{field}: is 101 tokens; at most 100 are listed$"):
        check_tokenized(prompt, 101, 100)
