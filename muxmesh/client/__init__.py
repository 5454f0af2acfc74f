"""The client: `MeshClient` (async) and `SyncMeshClient`. Needs neither torch nor Redis."""

from muxmesh.client.aio import MeshClient
from muxmesh.client.outputs import (
    Candidate,
    Completion,
    Delta,
    Finish,
    PromptFacts,
    Scheduling,
    Timings,
    TokenLogprobs,
)
from muxmesh.client.prompts import Conversation, Message, Prompt
from muxmesh.client.request_options import OutputOptions, RequestOptions
from muxmesh.client.retries import NO_RETRIES, Retries
from muxmesh.client.sync import SyncMeshClient
from muxmesh.client.tls import Tls
from muxmesh.client.tokens import Tokenized
from muxmesh.types import Waits

__all__ = [
    "NO_RETRIES",
    "Candidate",
    "Completion",
    "Conversation",
    "Delta",
    "Finish",
    "MeshClient",
    "Message",
    "OutputOptions",
    "Prompt",
    "PromptFacts",
    "RequestOptions",
    "Retries",
    "Scheduling",
    "SyncMeshClient",
    "Timings",
    "Tls",
    "TokenLogprobs",
    "Tokenized",
    "Waits",
]
