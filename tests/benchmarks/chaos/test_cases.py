"""The load: functions of a seed, with every kind of request and every behaviour of clients."""

import random
from itertools import islice

import pytest

from benchmarks.chaos.cases import (
    FULL_LOAD,
    GPU_LOAD,
    Case,
    LoadSize,
    Request,
    requests_of_client,
    sample_cases,
)

SIZES = pytest.mark.parametrize("size", [FULL_LOAD, GPU_LOAD])


def cases(seed: int, size: LoadSize = FULL_LOAD) -> list[Case]:
    return sample_cases(random.Random(seed), ["a", "b"], size)


def most_tokens(case: Case) -> int:
    """Of prompt, a token for each byte, and output."""
    prompt = case.prompt
    text = prompt if isinstance(prompt, str) else "".join(str(part) for part in prompt)
    num_prompt = len(text.encode()) if not isinstance(prompt, list) else len(prompt)
    return int(num_prompt + case.options["max_new_tokens"])


def requests(seed: int, num_requests: int = 500) -> list[Request]:
    return list(islice(requests_of_client(random.Random(seed), cases(1)), num_requests))


def test_the_same_seed_gives_the_same_cases_and_requests() -> None:
    assert cases(1) == cases(1) != cases(2)
    assert requests(1) == requests(1) != requests(2)


@SIZES
def test_every_kind_of_load_is_among_the_cases(size: LoadSize) -> None:
    sampled = cases(3, size)
    assert len(sampled) == size.num_cases
    assert {case.kind for case in sampled} == {kind.name for kind in size.kinds}
    assert {case.model for case in sampled} == {"a", "b"}


@SIZES
def test_every_case_determines_its_output(size: LoadSize) -> None:
    for seed in range(10):
        for case in cases(seed, size):
            assert case.options["temperature"] == 0 or "seed" in case.options
            assert case.options["max_new_tokens"] >= 1


def test_every_case_fits_into_the_context_of_512_tokens() -> None:
    """A prompt of bytes, the chat template, and the longest output."""
    assert all(most_tokens(case) < 500 for seed in range(300) for case in cases(seed))


def test_every_case_for_a_gpu_fits_into_its_pool_and_six_do_not() -> None:
    """The pool of `meshes.GPU_MESH`, which serves six sequences at a time, holds 256 tokens."""
    sampled = [most_tokens(case) for seed in range(300) for case in cases(seed, GPU_LOAD)]
    assert max(sampled) < 256
    assert sum(sampled) / len(sampled) * 6 > 256


def test_no_case_for_a_gpu_asks_for_log_probabilities() -> None:
    assert not [case for seed in range(30) for case in cases(seed, GPU_LOAD) if "logprobs" in case.options]


def test_requests_of_a_case_differ_only_in_what_leaves_the_output_as_it_is() -> None:
    harmless = {"cache_salt", "priority", "bypass_prefix_cache", "expected_output_tokens"}
    assert {name for request in requests(1) for name in request.options} == harmless


def test_some_clients_cancel_some_have_a_deadline_and_most_wait_for_the_end() -> None:
    sampled = requests(1)
    num_cancels = sum(request.cancel_after_s is not None for request in sampled)
    num_deadlines = sum(request.timeout_s is not None for request in sampled)
    assert 20 < num_cancels < 120
    assert 20 < num_deadlines < 120
    assert not any(request.cancel_after_s and request.timeout_s for request in sampled)
