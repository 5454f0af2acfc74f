"""The client: `MeshClient` (async) and `SyncMeshClient`. Needs neither torch nor Redis."""

from muxmesh.client.aio import (
    Candidate,
    Completion,
    Delta,
    Finish,
    MeshClient,
    Message,
    PromptFacts,
    Scheduling,
    Timings,
    TokenLogprobs,
)
from muxmesh.client.sync import SyncMeshClient

__all__ = [
    "Candidate",
    "Completion",
    "Delta",
    "Finish",
    "MeshClient",
    "Message",
    "PromptFacts",
    "Scheduling",
    "SyncMeshClient",
    "Timings",
    "TokenLogprobs",
]
