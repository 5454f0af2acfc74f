"""A chat without its terminal: the turns so far, and what a message, a command and the choice of a model do."""

from __future__ import annotations

import asyncio

from muxmesh.cli.message_lines import HELP
from muxmesh.cli.streamed_output import StreamedOutput
from muxmesh.client import MeshClient, Message, RequestOptions
from muxmesh.errors import ConfigError, InvalidRequest, ModelNotFound
from muxmesh.quoting import named, quoted


class Turns:
    """The turns that the model sees: a system message, and complete pairs of a user's message and its reply."""

    def __init__(self, system: str | None) -> None:
        self._system = [Message("system", system)] if system else []
        self._turns: list[Message] = []

    def with_message(self, text: str) -> list[Message]:
        """The turns and ``text`` as the user's next one; the conversation is unchanged."""
        return [*self._system, *self._turns, Message("user", text)]

    def add(self, text: str, reply: str) -> None:
        """Appends the user's message and the reply to it."""
        self._turns += [Message("user", text), Message("assistant", reply)]

    def clear(self) -> None:
        """Removes all turns but the system message."""
        self._turns.clear()

    @property
    def is_empty(self) -> bool:
        return not self._turns


async def converse(client: MeshClient, turns: Turns, message: str, options: RequestOptions) -> None:
    """Sends a message and adds it with its reply. If cancelled, it adds what has been printed of the reply."""
    output = StreamedOutput()
    try:
        await output.stream(client, turns.with_message(message), **options)
    except asyncio.CancelledError:
        if output.text:
            turns.add(message, output.text)
        raise
    turns.add(message, output.text)


def obey(command: str, turns: Turns) -> str:
    """Carries out a command and returns what to say. Raises ConfigError for an unknown one."""
    if command in ("/help", "/?"):
        return HELP
    if command != "/clear":
        raise ConfigError(f"{named(command)} is not a command; /help lists them")
    turns.clear()
    return "the conversation is cleared"


async def chat_models(client: MeshClient, wanted: str | None) -> list[str]:
    """The models to choose from; only ``wanted`` if it is given. Raises ModelNotFound, InvalidRequest."""
    models = {model.name: model.has_chat_template for model in await client.list_models()}
    if wanted is not None and wanted not in models:
        raise ModelNotFound(
            f"--model: the mesh does not serve {quoted(wanted)}; it serves {', '.join(models) or 'none'}"
        )
    names = [wanted] if wanted is not None else list(models)
    usable = [name for name in names if models[name]]
    if not usable:
        raise InvalidRequest(
            "model", f"{', '.join(names)} has no chat template; use `muxmesh generate`" if names else "none is served"
        )
    return usable
