"""An OpenAI-compatible server on the loopback interface that streams a script and records its requests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web


class ScriptedOpenAi:
    """Streams ``events``. With ``is_cut`` it then drops the connection; with ``holds`` the stream stays open.

    ``status`` other than 200 refuses every completion. ``models`` is the body of `/v1/models`.
    """

    def __init__(self) -> None:
        self.bodies: list[tuple[str, dict[str, Any]]] = []
        self.models: Any = {"data": [{"id": "first"}, {"id": "second"}]}
        self.models_status = 200
        self.events: list[str] = []
        self.status = 200
        self.is_cut = False
        self.holds = False
        self.aborted = asyncio.Event()

    async def list_models(self, request: web.Request) -> web.Response:
        return web.json_response(self.models, status=self.models_status)

    async def complete(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append((request.path, await request.json()))
        if self.status != 200:
            return web.Response(status=self.status, text="overloaded")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for event in self.events:
            await response.write(event.encode())
        if self.is_cut:
            assert request.transport is not None
            request.transport.close()
        if self.holds:
            try:
                await asyncio.Event().wait()
            finally:
                self.aborted.set()
        return response


def data(content: Any) -> str:
    """A server-sent event with ``content`` as JSON."""
    return f"data: {json.dumps(content)}\n\n"


def chunk(text: str, finish: str | None = None) -> str:
    return data({"choices": [{"index": 0, "text": text, "finish_reason": finish}], "usage": None})


def usage(num_input: int, num_output: int, **details: Any) -> str:
    """The chunk with the token counts."""
    counts = {"prompt_tokens": num_input, "completion_tokens": num_output, **details}
    return data({"choices": [], "usage": counts})


DONE = "data: [DONE]\n\n"


@asynccontextmanager
async def scripted_openai() -> AsyncIterator[tuple[ScriptedOpenAi, str]]:
    """Serves a `ScriptedOpenAi`; yields it with its URL."""
    server = ScriptedOpenAi()
    app = web.Application()
    app.router.add_get("/v1/models", server.list_models)
    app.router.add_post("/v1/completions", server.complete)
    app.router.add_post("/v1/chat/completions", server.complete)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    (address,) = runner.addresses
    try:
        yield server, f"http://127.0.0.1:{address[1]}"
    finally:
        await runner.cleanup()
