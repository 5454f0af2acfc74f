"""Chat templates that never end or cannot be compiled, in a mesh of real processes: other requests do not notice."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from muxmesh.client import Message
from muxmesh.errors import InvalidRequest
from muxmesh.v1 import mesh_pb2
from tests.support.mesh import RunningMesh, collect, running_mesh
from tests.support.tiny import TinyShape, write_tiny_model

pytestmark = [pytest.mark.mesh, pytest.mark.asyncio(loop_scope="module")]
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
USER = [Message("user", "hi")]
TEMPLATES = {
    "endless": ENDLESS,
    "broken": "{% for m in messages %}",
    "sound": "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}{{ strftime_now('%Y') }}",
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningMesh]:
    folder = tmp_path_factory.mktemp("mesh")
    models: list[dict[str, Any]] = []
    for name, template in TEMPLATES.items():
        write_tiny_model(folder / name, TinyShape())
        (folder / name / "chat_template.jinja").write_text(template)
        (folder / name / "generation_config.json").write_text(json.dumps({"top_k": 7, "max_new_tokens": 5}))
        models.append({"name": name, "engine": "sim", "source": str(folder / name)})
    unit = {"kv_pool": "8MiB", "slab": "64KiB", "models": models}
    async with running_mesh(folder, units=[unit]) as running:
        yield running


async def test_a_template_without_an_end_is_stopped_and_delays_no_other_model(mesh: RunningMesh) -> None:
    endless = [asyncio.create_task(collect(mesh.client.stream(USER, model="endless"))) for _ in range(4)]
    for _ in range(5):
        for prompt, model in ((USER, "sound"), ("text", "endless"), ("text", "sound")):
            _, tokens, _ = await collect(mesh.client.stream(prompt, model=model, max_new_tokens=3))
            assert len(tokens) == 3
    assert not all(task.done() for task in endless), "the other requests were served meanwhile"
    for result in await asyncio.gather(*endless, return_exceptions=True):
        assert isinstance(result, InvalidRequest)
        assert "chat.messages: the model's chat template took more than" in str(result)


async def test_a_template_that_cannot_be_compiled_refuses_chat_and_leaves_text_working(mesh: RunningMesh) -> None:
    with pytest.raises(InvalidRequest, match=r"chat: the model's chat template cannot be compiled: line 1"):
        await collect(mesh.client.stream(USER, model="broken"))
    _, tokens, _ = await collect(mesh.client.stream("text", model="broken", max_new_tokens=3))
    assert len(tokens) == 3


async def test_the_models_report_their_templates_and_sampling_defaults(mesh: RunningMesh) -> None:
    listed = await mesh.client.list_models()
    assert {one.name: one.has_chat_template for one in listed} == {"endless": True, "broken": False, "sound": True}
    assert all(one.sampling_defaults == mesh_pb2.SamplingDefaults(top_k=7) for one in listed)
    assert all(one.default_max_new_tokens == 5 for one in listed)
