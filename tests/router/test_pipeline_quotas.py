"""What the pipeline reserves and settles, with scripted attempts."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from muxmesh.engine.api import Finished, Tokens
from muxmesh.errors import InvalidRequest, PermissionDenied, QuotaExceeded, SequenceFailed
from muxmesh.tenants.tenant import Tenant
from muxmesh.types import EngineRequest, Finish, FinishReason
from router.attempt import Prefilled
from router.generation import GenerationRequest, StoppingOptions, TextPrompt
from router.quotas import Settles
from router.request_record import RequestRecord
from tests.support.pipeline_parts import Script, Step, pipeline_parts, tokens_of, until, writes
from tests.support.tenants import tenant

PROMPT = "hello"
REQUEST = GenerationRequest("m", TextPrompt(PROMPT), tenant=tenant(), stopping=StoppingOptions(max_new_tokens=10))


@dataclass
class RecordingQuotas:
    """Grants everything, unless there is an ``error``, and records it."""

    error: Exception | None = None
    reserved: list[tuple[str, int]] = field(default_factory=list)
    settled: list[tuple[int, int]] = field(default_factory=list)

    async def reserve(self, of: Tenant, num_tokens: int) -> Settles:
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        self.reserved.append((of.name, num_tokens))
        return _Recorded(self)


@dataclass
class _Recorded:
    quotas: RecordingQuotas

    def settle(self, prompt_tokens: int, output_tokens: int) -> None:
        self.quotas.settled.append((prompt_tokens, output_tokens))


async def run(script: Script, request: GenerationRequest = REQUEST, quotas: RecordingQuotas | None = None) -> Any:
    """Serves one request; returns what was reserved and settled, and the outcome."""
    quotas = quotas or RecordingQuotas()
    outcome: Any = None
    async with pipeline_parts(script, quotas=quotas) as parts:
        try:
            parts.pipeline.validate(request)
            async with aclosing(await parts.pipeline.start(request, RequestRecord("r", 100.0))) as deltas:
                outcome = [delta async for delta in deltas]
        except Exception as error:  # noqa: BLE001 - it is the outcome
            outcome = error
        assert parts.pipeline.counters["m"].num_running == parts.pipeline.counters["m"].num_preparing == 0
    return quotas.reserved, quotas.settled, outcome


async def test_a_finished_request_is_charged_for_its_prompt_and_its_output() -> None:
    script = writes("abc", Finish(FinishReason.EOS, 0))
    reserved, settled, _ = await run(script, replace(REQUEST, stopping=StoppingOptions(max_new_tokens=10)))
    assert settled == [(5, 3)]
    ((name, num_tokens),) = reserved
    assert name == "acme" and 5 < num_tokens <= 15


async def test_a_length_that_is_known_is_what_is_reserved_for_each_sequence() -> None:
    stopping = StoppingOptions(max_new_tokens=3, ignore_eos=True)
    reserved, settled, _ = await run(writes("abc"), replace(REQUEST, stopping=stopping, num_sequences=4))
    assert reserved == [("acme", 5 + 4 * 3)]
    assert settled == [(5, 12)]


async def test_a_refused_request_is_never_queued() -> None:
    refused = QuotaExceeded("tokens_per_minute", "no tokens are left", 5.0)
    reserved, settled, outcome = await run(writes("abc"), quotas=RecordingQuotas(refused))
    assert (reserved, settled, outcome) == ([], [], refused)


async def test_a_request_that_fails_before_its_prefill_is_charged_nothing() -> None:
    def fails(request: EngineRequest) -> Iterable[Step]:
        yield InvalidRequest("stopping.max_new_tokens", "is too long")

    _, settled, outcome = await run(fails)
    assert settled == [(0, 0)]
    assert isinstance(outcome, InvalidRequest)


async def test_a_request_that_fails_on_the_way_is_charged_for_what_was_computed() -> None:
    def fails(request: EngineRequest) -> Iterable[Step]:
        yield Prefilled(0)
        if not request.resume_token_ids:
            yield Tokens(0, tokens_of("ab"))
        yield SequenceFailed("x")

    _, settled, outcome = await run(fails)
    assert settled == [(5, 2)]
    assert isinstance(outcome, SequenceFailed)


async def test_a_request_that_the_client_cancels_is_charged_for_what_was_computed() -> None:
    stays = asyncio.Event()

    def script(request: EngineRequest) -> Iterable[Step]:
        yield Prefilled(0)
        yield Tokens(0, tokens_of("a"))
        yield stays
        yield Finished(Finish(FinishReason.LENGTH))

    quotas = RecordingQuotas()
    async with pipeline_parts(script, quotas=quotas) as parts:
        deltas = await parts.pipeline.start(REQUEST, RequestRecord("r", 100.0))
        await anext(deltas)
        await deltas.aclose()
    assert quotas.settled == [(5, 1)]


async def test_a_request_that_is_cancelled_in_the_queue_is_charged_nothing() -> None:
    quotas = RecordingQuotas()
    async with pipeline_parts(writes("abc"), quotas=quotas) as parts:
        parts.admission.open.clear()

        async def serve() -> None:
            async with aclosing(await parts.pipeline.start(REQUEST, RequestRecord("r", 100.0))) as deltas:
                async for _ in deltas:
                    pass

        task = asyncio.ensure_future(serve())
        await until(lambda: parts.admission.num_queued("m") == 1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert quotas.settled == [(0, 0)]


@pytest.mark.parametrize(
    ("limits", "changes", "problem"),
    [
        ({"max_request_tokens": 14}, {}, "is 10; requests of tenant acme have at most 14 tokens .* so at most 9"),
        ({"max_request_tokens": 5}, {}, "is 5 tokens; requests of tenant acme have at most 5 tokens"),
        ({"max_request_tokens": 24}, {"num_sequences": 2}, "is 10; .* so at most 9"),
        ({"best_priority": 1}, {"priority": -1}, "is -1; tenant acme may ask for 1 or a higher number"),
        ({"best_priority": -1}, {"priority": -2}, "is -2; tenant acme may ask for -1"),
        ({"best_priority": 5}, {"priority": 4}, "is 4; tenant acme may ask for 5"),
    ],
)
async def test_what_a_tenant_may_not_ask_for_is_refused(
    limits: dict[str, Any], changes: dict[str, Any], problem: str
) -> None:
    reserved, _, outcome = await run(writes("abc"), replace(REQUEST, tenant=tenant(**limits), **changes))
    assert isinstance(outcome, PermissionDenied if "best_priority" in limits else InvalidRequest)
    assert re.search(problem, str(outcome))
    assert reserved == []


@pytest.mark.parametrize(("best", "asked", "used"), [(3, 0, 3), (-3, 0, 0), (-3, -3, -3), (3, 7, 7), (None, -9, -9)])
async def test_a_request_without_a_priority_has_the_best_of_its_tenant(best: int | None, asked: int, used: int) -> None:
    request = replace(REQUEST, tenant=tenant(best_priority=best), priority=asked)
    async with pipeline_parts(writes("abc")) as parts:
        async with aclosing(await parts.pipeline.start(request, RequestRecord("r", 100.0))) as deltas:
            async for _ in deltas:
                pass
        assert parts.attempts.requests[0].scheduling.priority == used


async def test_a_default_length_is_cut_to_what_the_tenant_may_have() -> None:
    request = replace(REQUEST, tenant=tenant(max_request_tokens=9), stopping=StoppingOptions())
    async with pipeline_parts(writes("abcdefgh")) as parts:
        async with aclosing(await parts.pipeline.start(request, RequestRecord("r", 100.0))) as deltas:
            async for _ in deltas:
                pass
        assert parts.attempts.requests[0].stopping.max_new_tokens == 4


async def test_the_kv_and_the_predictor_go_by_the_id_of_the_tenant() -> None:
    async with pipeline_parts(writes("abc")) as parts:
        async with aclosing(await parts.pipeline.start(REQUEST, RequestRecord("r", 100.0))) as deltas:
            async for _ in deltas:
                pass
        assert parts.attempts.requests[0].tenant == "id-acme"
