"""The target for an OpenAI-compatible server: streamed `/v1/completions`, for chats `/v1/chat/completions`."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from typing import Any

import aiohttp

from loadtest.target import Piece, ServedModel, StreamEnd, TargetError
from loadtest.workload import PlannedRequest
from muxmesh.errors import Unavailable
from muxmesh.quoting import named, quoted

_CONNECT_TIMEOUT_S = 10.0
_READ_BUFFER = 1 << 20
_DATA = b"data:"


class OpenAiTarget:
    """See `Target`. ``vocabulary``: the token ids for random prompts; the OpenAI API reports no vocabulary size."""

    def __init__(self, url: str, vocabulary: range, temperature: float | None, timeout_s: float | None) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self.name = f"OpenAI API at {self._url}"
        self._vocabulary = vocabulary
        self._temperature = temperature
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=_CONNECT_TIMEOUT_S)
        self._session = aiohttp.ClientSession(
            timeout=timeout, connector=aiohttp.TCPConnector(limit=0), read_bufsize=_READ_BUFFER
        )
        self._default_model: str | None = None

    async def models(self) -> list[ServedModel]:
        try:
            timeout = aiohttp.ClientTimeout(total=_CONNECT_TIMEOUT_S)
            async with self._session.get(f"{self._url}/v1/models", timeout=timeout) as response:
                response.raise_for_status()
                content = await response.json()
            names = [str(model["id"]) for model in content["data"]]
        except (aiohttp.ClientError, TimeoutError) as error:
            raise Unavailable(f"no OpenAI-compatible server answers at {self._url}: {_problem(error)}") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise Unavailable(f"{self._url}/v1/models returns no list of models: {quoted(error)}") from error
        if not names:
            raise Unavailable(f"{self._url} serves no model")
        self._default_model = names[0]
        takes_salt = any(model.get("owned_by") == "vllm" for model in content["data"])
        return [ServedModel(name, self._vocabulary, takes_salt) for name in names]

    async def stream(self, request: PlannedRequest) -> AsyncIterator[Piece | StreamEnd]:
        """See `Target`. A chunk is one token, unless it only opens or ends; the final usage has the exact count."""
        path, body = self._body(request)
        end: StreamEnd | None = None
        finish = ""
        try:
            async with self._session.post(f"{self._url}{path}", json=body) as response:
                if response.status != 200:
                    raise TargetError(f"HTTP {response.status}", (await response.text())[:500])
                async for line in response.content:
                    if not line.startswith(_DATA):
                        continue
                    event = line[len(_DATA) :].strip()
                    if event == b"[DONE]":
                        break
                    chunk = json.loads(event)
                    if "error" in chunk:
                        raise TargetError("STREAM ERROR", json.dumps(chunk["error"])[:500])
                    for choice in chunk.get("choices", ()):
                        finish = choice.get("finish_reason") or finish
                        if not _is_without_token(choice):
                            yield Piece(1)
                    if usage := chunk.get("usage"):
                        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
                        end = StreamEnd(int(usage["prompt_tokens"]), int(usage["completion_tokens"]), finish, cached)
        except aiohttp.ClientConnectorError as error:
            raise TargetError("UNREACHABLE", str(error), is_unreachable=True) from error
        except TimeoutError as error:
            raise TargetError("TIMEOUT", "the deadline passed") from error
        except aiohttp.ClientError as error:
            raise TargetError("CONNECTION LOST", str(error) or type(error).__name__, is_unreachable=True) from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise TargetError("BAD RESPONSE", f"not a chunk of a completion: {quoted(error)}") from error
        if end is None or not finish:
            raise TargetError("CUT OFF", "the stream ended without a finish reason or without usage")
        yield StreamEnd(end.num_input, end.num_output, finish, end.num_cached)

    async def close(self) -> None:
        await self._session.close()

    def _body(self, request: PlannedRequest) -> tuple[str, dict[str, Any]]:
        body: dict[str, Any] = {
            "model": request.model or self._default_model,
            "max_tokens": request.max_new_tokens,
            "seed": request.seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._temperature is not None:
            body["temperature"] = self._temperature
        if request.tenant is not None:
            body["user"] = request.tenant
        if request.sent_salt:
            body["cache_salt"] = request.sent_salt  # vLLM's extension
        if request.priority:
            body["priority"] = request.priority  # vLLM's extension
        if request.is_forced:
            body |= {"ignore_eos": True, "min_tokens": request.max_new_tokens}  # vLLM's extensions
        if request.is_chat:
            return "/v1/chat/completions", body | {"messages": [{"role": "user", "content": request.prompt}]}
        return "/v1/completions", body | {"prompt": request.prompt}


def _is_without_token(choice: dict[str, Any]) -> bool:
    """The first chunk of a chat carries the role, and the last one of an output may carry only its finish reason.

    Others without text are tokens: of several that form a character, only the last has text.
    """
    delta = choice.get("delta") or {}
    has_text = choice.get("text") or any(value for key, value in delta.items() if key != "role")
    return not has_text and ("role" in delta or bool(choice.get("finish_reason")))


def _problem(error: aiohttp.ClientError | TimeoutError) -> str:
    """Why the list of models could not be read."""
    if isinstance(error, TimeoutError):
        return f"no response within {_CONNECT_TIMEOUT_S:.0f} s"
    if not isinstance(error, aiohttp.ClientConnectorError):
        return named(str(error))
    number = error.errno or 0
    return os.strerror(number) if number > 0 else named(error.strerror or str(error))  # below 0: of name resolution
