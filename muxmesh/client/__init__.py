"""The client: `MeshClient` (async) and `SyncMeshClient`. Needs neither torch nor Redis."""

from muxmesh.client.aio import Completion, Delta, Finish, MeshClient, Message, Timings
from muxmesh.client.sync import SyncMeshClient

__all__ = ["Completion", "Delta", "Finish", "MeshClient", "Message", "SyncMeshClient", "Timings"]
