"""The client: `MeshClient` (async) and `SyncMeshClient`. Needs neither torch nor Redis."""

from muxmesh.client.aio import MeshClient
from muxmesh.client.outputs import (
    Completion,
    Delta,
    Finish,
    PromptFacts,
    Scheduling,
    Timings,
)
from muxmesh.client.prompts import Message, Prompt
from muxmesh.client.request_options import OutputOptions, RequestOptions
from muxmesh.client.retries import NO_RETRIES, Retries
from muxmesh.client.sync import SyncMeshClient
from muxmesh.types import Candidate, TokenLogprobs

__all__ = [
    "NO_RETRIES",
    "Candidate",
    "Completion",
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
    "TokenLogprobs",
]
