from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest

from muxmesh.client import Conversation, MeshClient, Message, SyncMeshClient, Tokenized
from muxmesh.client.tokens import tokenized_of
from muxmesh.errors import InvalidRequest
from muxmesh.v1 import inference_pb2
from tests.support.fake_mesh import FakeMesh, fake_mesh, fake_mesh_in_thread

UNREACHABLE = "127.0.0.1:1"


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[FakeMesh]:
    async with fake_mesh(tmp_path) as fake:
        yield fake


@pytest.fixture
async def client(mesh: FakeMesh) -> AsyncIterator[MeshClient]:
    async with MeshClient(mesh.address) as connected:
        yield connected


async def test_a_text_is_tokenized_and_back(mesh: FakeMesh, client: MeshClient) -> None:
    assert await client.tokenize("hé") == Tokenized((104, 233), 100)
    assert await client.detokenize([104, 233]) == "hé"
    assert mesh.token_requests == [
        inference_pb2.TokenizeRequest(text="hé"),
        inference_pb2.DetokenizeRequest(token_ids=[104, 233]),
    ]


async def test_the_options_of_tokenize_and_detokenize_are_sent(mesh: FakeMesh, client: MeshClient) -> None:
    conversation: Conversation = [Message("user", "hi"), {"role": "assistant", "content": "ho"}]
    await client.tokenize(conversation, model="m", add_special_tokens=False, with_texts=True)
    await client.detokenize([5], model="m", skip_special_tokens=True)
    assert mesh.token_requests == [
        inference_pb2.TokenizeRequest(
            model="m",
            chat=inference_pb2.ChatPrompt(
                messages=[
                    inference_pb2.ChatMessage(role="user", content="hi"),
                    inference_pb2.ChatMessage(role="assistant", content="ho"),
                ]
            ),
            add_special_tokens=False,
            token_texts=True,
        ),
        inference_pb2.DetokenizeRequest(model="m", token_ids=[5], skip_special_tokens=True),
    ]


async def test_texts_and_bytes_of_tokens_are_values() -> None:
    response = inference_pb2.TokenizeResponse(
        token_ids=[5, 6], num_tokens=2, max_model_len=9, token_texts=["a", "\ufffd"], token_bytes=[b"a", b"\xc3"]
    )
    assert tokenized_of(response) == Tokenized((5, 6), 9, ("a", "\ufffd"), (b"a", b"\xc3"))


async def test_what_cannot_be_tokenized_is_refused_before_it_is_sent() -> None:
    async with MeshClient(UNREACHABLE) as unconnected:
        for call, field in (
            (unconnected.tokenize(cast(Any, [5, 6])), "prompt"),
            (unconnected.tokenize("x", model=cast(Any, 5)), "model"),
            (unconnected.detokenize([-1]), "token_ids"),
            (unconnected.detokenize(cast(Any, "text")), "token_ids"),
        ):
            with pytest.raises(InvalidRequest) as caught:
                await call
            assert caught.value.field == field


def test_the_sync_client_has_both_calls(tmp_path: Path) -> None:
    with fake_mesh_in_thread(tmp_path) as mesh, SyncMeshClient(mesh.address) as client:
        assert client.tokenize("hi", with_texts=False) == Tokenized((104, 105), 100)
        assert client.detokenize((104, 105)) == "hi"
