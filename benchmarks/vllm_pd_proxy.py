"""A proxy in front of vLLM's prefill/decode pair, for `benchmarks.vs_vllm --pd`. Arguments: PORT PREFILL DECODE.

Each request goes to the prefill server for one token. The transfer parameters of its KV then go with the request to the
decode server, which fetches the KV over NIXL and streams the output.
"""

from __future__ import annotations

import sys
from typing import Any

import aiohttp
from aiohttp import web

_SESSION = web.AppKey("session", aiohttp.ClientSession)


class Proxy:
    """Relays each completion through both servers."""

    def __init__(self, prefill: str, decode: str) -> None:
        self._prefill, self._decode = prefill, decode

    async def models(self, request: web.Request) -> web.Response:
        """The models of the decode server."""
        async with request.app[_SESSION].get(f"{self._decode}/v1/models") as models:
            return web.json_response(await models.json())

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """Prefills one request, then relays the stream of the decode server."""
        body: dict[str, Any] = await request.json()
        remote_decode = {
            "do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None, "remote_block_ids": None,
            "remote_host": None, "remote_port": None,
        }  # fmt: skip
        first = {**body, "stream": False, "max_tokens": 1, "kv_transfer_params": remote_decode}
        first.pop("stream_options", None)
        session = request.app[_SESSION]
        async with session.post(f"{self._prefill}{request.path}", json=first) as prefilled:
            if prefilled.status != 200:
                return web.Response(status=prefilled.status, text=await prefilled.text())
            body["kv_transfer_params"] = (await prefilled.json())["kv_transfer_params"]
        async with session.post(f"{self._decode}{request.path}", json=body) as decoded:
            response = web.StreamResponse(status=decoded.status, headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            async for part in decoded.content.iter_any():
                await response.write(part)
            return response


async def _session(app: web.Application) -> Any:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:
        app[_SESSION] = session
        yield


def main() -> None:
    """Serves until the process is terminated."""
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
