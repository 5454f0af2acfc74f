"""The load: functions of a seed, with every kind of request and every behaviour of clients."""

import random
from itertools import islice

from benchmarks.chaos.cases import LOAD_KINDS, NUM_CASES, Case, Request, requests_of_client, sample_cases


def cases(seed: int) -> list[Case]:
    return sample_cases(random.Random(seed), ["a", "b"])


def requests(seed: int, num_requests: int = 500) -> list[Request]:
    return list(islice(requests_of_client(random.Random(seed), cases(1)), num_requests))


def test_the_same_seed_gives_the_same_cases_and_requests() -> None:
    assert cases(1) == cases(1) != cases(2)
    assert requests(1) == requests(1) != requests(2)


def test_every_kind_of_load_is_among_the_cases() -> None:
    sampled = cases(3)
    assert len(sampled) == NUM_CASES
    assert {case.kind for case in sampled} == {kind.name for kind in LOAD_KINDS}
    assert {case.model for case in sampled} == {"a", "b"}


def test_every_case_determines_its_output() -> None:
    for seed in range(10):
        for case in cases(seed):
            assert case.options["temperature"] == 0 or "seed" in case.options
            assert case.options["max_new_tokens"] >= 1


def test_every_case_fits_into_the_context_of_512_tokens() -> None:
    """A prompt of bytes, the chat template, and the longest output."""
    for seed in range(300):
        for case in cases(seed):
            prompt, most = case.prompt, case.options["max_new_tokens"]
            text = prompt if isinstance(prompt, str) else "".join(str(part) for part in prompt)
            num_prompt = len(text.encode()) if not isinstance(prompt, list) else len(prompt)
            assert num_prompt + most < 500, case


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
