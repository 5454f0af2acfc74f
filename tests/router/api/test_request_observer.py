"""What is measured and logged of requests, however they end, on a real server."""

import asyncio
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import grpc
import pytest

from muxmesh.engine.api import Tokens
from muxmesh.errors import EngineFailed
from muxmesh.metrics.exposition import render
from muxmesh.types import EngineRequest, Finish, FinishReason
from router.api.request_observer import RequestObserver
from router.attempt import Prefilled
from router.request_record import RequestRecord
from router.sequence_driver import Progress
from tests.router.api.test_inference_service import Setup, request, service
from tests.router.test_request_metrics import samples
from tests.support.pipeline_parts import Step, pipeline_parts, until, writes

TEXT = "the prompt's own words"


@pytest.fixture(autouse=True)
def info_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "router.requests")


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "router.requests"]


def ended(setup: Setup) -> dict[tuple[str, ...], float]:
    return {key: value for key, value in samples(setup.parts.metrics, "muxmesh_requests_total").items() if value}


async def test_a_request_that_finishes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with service(tmp_path, writes("abc", Finish(FinishReason.EOS, 0), Prefilled(4))) as setup:
        await setup.stub.Generate(request(request_id="r-1"))
        assert ended(setup) == {("m", "OK"): 1}
        assert samples(setup.parts.metrics, "vllm:inter_token_latency_seconds_count") == {("m",): 2}
    (line,) = lines(caplog)
    assert line.startswith(
        "request id='r-1' model=m finish=stop code=OK prompt_tokens=5 cached_tokens=4 output_tokens=3 "
    )


async def test_each_sequence_of_a_request_counts_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with service(tmp_path, writes("ab")) as setup:
        await setup.stub.Generate(request(sampling={"num_sequences": 3}))
    (line,) = lines(caplog)
    assert "finish=length code=OK prompt_tokens=5 cached_tokens=0 output_tokens=6 " in line


async def test_a_request_that_its_client_cancels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def script(engine_request: EngineRequest) -> Iterable[Step]:
        return [Prefilled(0), Tokens(0, (70,)), asyncio.Event()]

    async with service(tmp_path, script) as setup:
        call = setup.stub.GenerateStream(request())
        await call.read()
        call.cancel()
        await until(lambda: bool(lines(caplog)))
        assert ended(setup) == {("m", "CANCELLED"): 1}
        assert samples(setup.parts.metrics, "vllm:request_success_total")["m", "abort"] == 1
    (line,) = lines(caplog)
    assert "model=m finish=abort code=CANCELLED prompt_tokens=5 cached_tokens=0 output_tokens=1 " in line


async def test_a_request_that_fails(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with service(tmp_path, lambda one: [Prefilled(0), EngineFailed("nan")]) as setup:
        with pytest.raises(grpc.aio.AioRpcError):
            await setup.stub.Generate(request())
        assert ended(setup) == {("m", "INTERNAL"): 1}
    (line,) = lines(caplog)
    assert "model=m finish=error code=INTERNAL prompt_tokens=5 " in line
    assert " restarts=1 preemptions=- " in line and line.endswith(" slo=-")


@pytest.mark.parametrize(
    ("fields", "model", "code"),
    [({"model": 'x"\n'}, "", "NOT_FOUND"), ({"text": ""}, "m", "INVALID_ARGUMENT")],
)
async def test_a_request_that_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fields: dict[str, Any], model: str, code: str
) -> None:
    async with service(tmp_path, writes("x")) as setup:
        with pytest.raises(grpc.aio.AioRpcError):
            await setup.stub.Generate(request(**fields))
        assert ended(setup) == {(model, code): 1}
    (line,) = lines(caplog)
    assert f" model={model or '-'} finish=error code={code} " in line


async def test_neither_log_nor_metrics_have_a_word_of_a_prompt(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with service(tmp_path, lambda one: [Prefilled(0), EngineFailed(TEXT)]) as setup:
        for fields in ({"text": TEXT}, {"text": TEXT * 100}, {"chat": {"messages": [{"role": TEXT, "content": TEXT}]}}):
            with pytest.raises(grpc.aio.AioRpcError):
                await setup.stub.Generate(request(**fields))
        metrics = render(setup.parts.metrics.families()).decode()
    assert len(lines(caplog)) == 3
    assert not any("own words" in line for line in lines(caplog))
    assert "own words" not in metrics


async def test_the_log_of_requests_can_be_switched_off(caplog: pytest.LogCaptureFixture) -> None:
    async with pipeline_parts(writes("x")) as parts:
        with RequestObserver(parts.metrics, parts.clock, logs=False).observed(RequestRecord("r", 100.0, "m")) as record:
            record.begin(1, [Progress()])
        assert samples(parts.metrics, "muxmesh_requests_total")["m", "OK"] == 1
    assert lines(caplog) == []


async def test_a_bug_counts_as_an_internal_error() -> None:
    async with pipeline_parts(writes("x")) as parts:
        with (
            pytest.raises(ZeroDivisionError),
            RequestObserver(parts.metrics, parts.clock).observed(RequestRecord("r", 100.0, "m")),
        ):
            raise ZeroDivisionError
        assert samples(parts.metrics, "muxmesh_requests_total")["m", "INTERNAL"] == 1
