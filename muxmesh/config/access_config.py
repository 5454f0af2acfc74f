"""The section `access` of mesh.yaml: who may call the mesh, and what holds while Redis is away."""

from __future__ import annotations

from typing import Literal

from muxmesh.config.section import Section


class AccessConfig(Section):
    """Who may send requests."""

    mode: Literal["open", "keys"] = "open"
    """`open`: everybody who can connect, without quotas. `keys`: callers with an API key of a tenant, which
    `muxmesh tenant add` makes; each tenant has its own quotas, prefix cache and length predictions."""
    open_on_network: bool = False
    """Has to be true for `mode: open` if other machines may connect to `listen`, so that a mesh without API keys is not
    reachable by accident."""
    on_redis_loss: Literal["open", "closed"] = "open"
    """With `mode: keys`, while Redis does not respond: `open` admits new requests by limits that each router keeps for
    itself, its part of those of the mesh; `closed` refuses them. Running requests go on in either case."""
