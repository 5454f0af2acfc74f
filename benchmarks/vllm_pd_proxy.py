"""Between a client and vLLM's own prefill/decode pair: what `benchmarks.vs_vllm --pd` drives. `PORT PREFILL DECODE`.

Each request goes to the prefill server for one token; what that says of its KV goes with the request to the decode
server, which fetches it over NIXL and streams the answer.
"""

from __future__ import annotations

import sys
from typing import Any

import aiohttp
from aiohttp import web

_SESSION = web.AppKey("session", aiohttp.ClientSession)


class Proxy:
    """Relays completions through both servers."""

    def __init__(self, prefill: str, decode: str) -> None:
        self._prefill, self._decode = prefill, decode

    async def models(self, request: web.Request) -> web.Response:
        """What the decode server serves."""
        async with request.app[_SESSION].get(f"{self._decode}/v1/models") as answer:
            return web.json_response(await answer.json())

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """One request: prefill first, then the stream of decode."""
        body: dict[str, Any] = await request.json()
        asked = {
            "do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None, "remote_block_ids": None,
            "remote_host": None, "remote_port": None,
        }  # fmt: skip
        first = {**body, "stream": False, "max_tokens": 1, "kv_transfer_params": asked}
        first.pop("stream_options", None)
        session = request.app[_SESSION]
        async with session.post(f"{self._prefill}{request.path}", json=first) as answer:
            if answer.status != 200:
                return web.Response(status=answer.status, text=await answer.text())
            body["kv_transfer_params"] = (await answer.json())["kv_transfer_params"]
        async with session.post(f"{self._decode}{request.path}", json=body) as answer:
            response = web.StreamResponse(status=answer.status, headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            async for part in answer.content.iter_any():
                await response.write(part)
            return response


async def _session(app: web.Application) -> Any:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:
        app[_SESSION] = session
        yield


def main() -> None:
    """Serves until it is ended."""
    port, prefill, decode = sys.argv[1:]
    proxy = Proxy(f"http://127.0.0.1:{prefill}", f"http://127.0.0.1:{decode}")
    app = web.Application()
    app.cleanup_ctx.append(_session)
    app.router.add_get("/v1/models", proxy.models)
    for path in ("/v1/completions", "/v1/chat/completions"):
        app.router.add_post(path, proxy.complete)
    web.run_app(app, host="127.0.0.1", port=int(port), print=lambda *_: None)


if __name__ == "__main__":
    main()
