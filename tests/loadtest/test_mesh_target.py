"""The wire of the mesh target, against a gRPC server on a unix socket."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from loadtest.mesh_target import MeshTarget
from loadtest.target import Piece, ServedModel, StreamEnd, TargetError
from loadtest.workload import PlannedRequest
from muxmesh.errors import (
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    MeshError,
    Overloaded,
    Unavailable,
    WorkerLost,
)
from muxmesh.slo import Slo
from muxmesh.v1 import inference_pb2, mesh_pb2
from tests.support.fake_mesh import FakeMesh, fake_mesh, first, last, tokens

REQUEST = PlannedRequest(0, 0.0, (5, 6, 7), False, 4, True, 42, "m", "tenant", -2)


@pytest_asyncio.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[FakeMesh]:
    async with fake_mesh(tmp_path) as mesh:
        yield mesh


@pytest_asyncio.fixture
async def target(mesh: FakeMesh) -> AsyncIterator[MeshTarget]:
    target = MeshTarget(mesh.address, 0.5, 20.0)
    yield target
    await target.close()


async def events(target: MeshTarget, request: PlannedRequest = REQUEST) -> list[Piece | StreamEnd]:
    return [event async for event in target.stream(request)]


async def sent(mesh: FakeMesh, target: MeshTarget, **changes: Any) -> inference_pb2.GenerateRequest:
    """The message that the mesh receives for a request."""
    mesh.script = [first(3, 0, (1,)), last(1)]
    await events(target, replace(REQUEST, **changes))
    return mesh.requests[-1]


async def test_models_have_the_slo_that_the_mesh_counts_by(mesh: FakeMesh, target: MeshTarget) -> None:
    mesh.models = ["none", "limits", "scale"]
    mesh.slos = {"limits": mesh_pb2.Slo(ttft_s=0.5, tpot_s=0.05), "scale": mesh_pb2.Slo(scale=8)}
    assert [model.slo for model in await target.models()] == [None, Slo(0.5, 0.05), Slo(scale=8)]


async def test_pieces_have_the_tokens_of_each_message(mesh: FakeMesh, target: MeshTarget) -> None:
    mesh.script = [first(3, 2, (1,)), tokens(2, 3), tokens(), last(4, (4,), router_s=0.25)]
    assert await events(target) == [Piece(1), Piece(2), Piece(1), StreamEnd(3, 4, "length", 2, 0.25)]


async def test_a_finish_may_come_without_tokens_and_timings(mesh: FakeMesh, target: MeshTarget) -> None:
    mesh.script = [first(3, 0, (1,)), last(1, reason=inference_pb2.FinishInfo.STOP)]
    assert await events(target) == [Piece(1), StreamEnd(3, 1, "stop", 0, None)]


async def test_a_forced_output_ignores_the_end_of_sequence(mesh: FakeMesh, target: MeshTarget) -> None:
    stopping = (await sent(mesh, target)).stopping
    assert (stopping.max_new_tokens, stopping.min_new_tokens, stopping.ignore_eos) == (4, 4, True)
    stopping = (await sent(mesh, target, is_forced=False)).stopping
    assert (stopping.max_new_tokens, stopping.min_new_tokens, stopping.ignore_eos) == (4, 0, False)


async def test_the_message_has_the_facts_of_the_request(mesh: FakeMesh, target: MeshTarget) -> None:
    message = await sent(mesh, target)
    assert (message.model, message.priority, message.temperature) == ("m", -2, 0.5)
    assert list(message.token_ids.ids) == [5, 6, 7]
    assert message.sampling.seed == 42
    assert message.response.output_token_ids


async def test_the_tenant_is_the_cache_salt(mesh: FakeMesh, target: MeshTarget) -> None:
    assert (await sent(mesh, target)).kv.cache_salt == "tenant"
    assert (await sent(mesh, target, tenant=None)).kv.cache_salt == ""


async def test_a_text_is_sent_as_text_and_a_chat_as_a_user_message(mesh: FakeMesh, target: MeshTarget) -> None:
    message = await sent(mesh, target, prompt="Hello")
    assert (message.text, message.HasField("chat")) == ("Hello", False)
    message = await sent(mesh, target, prompt="Hello", is_chat=True)
    assert [(turn.role, turn.content) for turn in message.chat.messages] == [("user", "Hello")]
    assert not message.HasField("text")


async def test_the_mesh_s_own_temperature_is_the_default(mesh: FakeMesh) -> None:
    target = MeshTarget(mesh.address, None, None)
    assert not (await sent(mesh, target)).HasField("temperature")
    await target.close()


async def test_a_request_without_a_model_goes_to_the_only_one(mesh: FakeMesh, target: MeshTarget) -> None:
    assert (await sent(mesh, target, model=None)).model in {"", "m"}, "an empty model is the only one"


async def test_a_salt_replaces_the_tenant_as_the_cache_salt(mesh: FakeMesh, target: MeshTarget) -> None:
    assert (await sent(mesh, target, tenant="t")).kv.cache_salt == "t"
    assert (await sent(mesh, target, tenant="t", cache_salt="s/t")).kv.cache_salt == "s/t"


async def test_random_prompts_leave_out_the_ends_of_the_vocabulary(mesh: FakeMesh, target: MeshTarget) -> None:
    mesh.models, mesh.vocab_sizes = ["a", "b"], {"a": 800}
    assert await target.models() == [ServedModel("a", range(100, 600)), ServedModel("b", range(32, 194))]


@pytest.mark.parametrize(
    ("error", "status", "is_unreachable"),
    [
        (InvalidRequest("stopping.max_new_tokens", "is too high"), "INVALID_ARGUMENT", False),
        (Overloaded("the queue is full"), "RESOURCE_EXHAUSTED", False),
        (DeadlineExceeded("too late"), "DEADLINE_EXCEEDED", False),
        (EngineFailed("the step raised"), "INTERNAL", False),
        (Unavailable("the unit is gone"), "UNAVAILABLE", True),
        (WorkerLost("the worker died"), "UNAVAILABLE", True),
    ],
)
async def test_an_error_keeps_its_status_and_message(
    mesh: FakeMesh, target: MeshTarget, error: MeshError, status: str, is_unreachable: bool
) -> None:
    mesh.script = [first(3, 0, (1,)), error]
    received = []
    with pytest.raises(TargetError) as caught:
        async for event in target.stream(REQUEST):
            received.append(event)  # noqa: PERF401 - the loop ends with an error
    assert received == [Piece(1)]
    assert (caught.value.status, str(caught.value)) == (status, str(error))
    assert caught.value.is_unreachable == is_unreachable


async def test_a_stream_without_a_finish_reason_is_an_error(mesh: FakeMesh, target: MeshTarget) -> None:
    mesh.script = [first(3, 0, (1,)), tokens(2)]
    with pytest.raises(TargetError, match="the stream ended without a finish reason") as error:
        await events(target)
    assert (error.value.status, error.value.is_unreachable) == ("INTERNAL", False)


async def test_a_mesh_that_is_absent_is_unavailable_by_its_address(tmp_path: Path) -> None:
    address = f"unix:{tmp_path / 'none.sock'}"
    target = MeshTarget(address, None, 20.0)
    assert target.name == f"mesh at {address}"
    with pytest.raises(Unavailable, match=rf"no mesh answers at {address} \("):
        await target.models()
    await target.close()
