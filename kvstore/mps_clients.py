"""When a client of an MPS daemon is gone, and when all clients of a unit have to end as a group. Pure.

    client of the unit             becomes
    connected                      exited, when its process has exited
    exited                         released, when the daemon answers and its server does not list it; a server that the
                                   daemon does not know counts once its process has exited
    exited for RELEASE_WITHIN_S    overdue: the other clients of the unit have to end
    exited for twice that          hopeless: the unit itself has to end, with its pool
    of a server in FAULT or gone   faulted: all clients of the unit have to end, and their KV is not to be used

Until it is released, work of a client may run on the device and write into the pool.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from muxmesh.cuda.mps import MpsServer, ServerStatus

RELEASE_WITHIN_S = 5.0
"""A daemon on a card removed a client from its list within a second of its exit."""


@dataclass(slots=True, eq=False)
class WatchedClient:
    """A process of the unit. ``server``: the one that listed it last. The flags say what has been reported of it."""

    pid: int
    server: int | None = None
    exited_at_s: float | None = None
    is_overdue: bool = False
    is_faulted: bool = False


@dataclass(frozen=True, slots=True)
class MpsFindings:
    """What an answer means. ``overdue``, ``hopeless`` and ``fault`` are reasons, empty if that is not the case.

    ``overdue`` and ``fault`` are found once for a client, ``hopeless`` again and again.
    """

    released: tuple[WatchedClient, ...] = ()
    overdue: str = ""
    hopeless: str = ""
    fault: str = ""


class MpsClients:
    """Owns the processes of a unit that are watched, until they are released."""

    def __init__(self, release_within_s: float = RELEASE_WITHIN_S) -> None:
        self._release_within_s = release_within_s
        self._clients: list[WatchedClient] = []

    def add(self, pid: int) -> WatchedClient:
        client = WatchedClient(pid)
        self._clients.append(client)
        return client

    def discard(self, client: WatchedClient) -> None:
        """Stops watching a client, released or not."""
        self._clients.remove(client)

    @property
    def servers(self) -> frozenset[int]:
        """Servers that have listed a client."""
        return frozenset(client.server for client in self._clients if client.server is not None)

    @property
    def some_have_exited(self) -> bool:
        """Whether a client that has exited is not released."""
        return any(client.exited_at_s is not None for client in self._clients)

    def apply(
        self, servers: Sequence[MpsServer] | str, alive: Collection[int], asked_at_s: float, now_s: float
    ) -> MpsFindings:
        """What the daemon's answer to a question of ``asked_at_s`` means. The caller discards released clients.

        ``servers``: the answer, or why there is none. ``alive``: those of `servers` whose processes have not exited.
        """
        if isinstance(servers, str):
            return MpsFindings((), self._overdue(servers, now_s), self._hopeless(servers, now_s))
        status = {server.pid: server.status for server in servers}
        listed = {pid: server.pid for server in servers for pid in server.clients}
        for client in self._clients:
            client.server = listed.get(client.pid, client.server)
        released = tuple(
            client
            for client in self._clients
            if client.exited_at_s is not None
            and client.exited_at_s <= asked_at_s
            and client.pid not in listed
            and (client.server in status or client.server not in alive)
        )
        late = "the MPS daemon still lists it"
        return MpsFindings(
            released,
            self._overdue(late, now_s, released),
            self._hopeless(late, now_s, released),
            self._fault(status),
        )

    def _fault(self, status: dict[int, ServerStatus]) -> str:
        """Why clients faulted for which that has not been found yet."""
        reason = ""
        for client in self._clients:
            if client.is_faulted or client.server is None:
                continue
            if status.get(client.server) is ServerStatus.FAULT:
                reason = f"MPS server {client.server} is in FAULT: the work of all its clients has failed"
            elif client.server not in status and client.exited_at_s is None:
                reason = f"MPS server {client.server} is gone: its daemon has restarted or stopped it"
            else:
                continue
            client.is_faulted = True
        return reason

    def _overdue(self, cause: str, now_s: float, released: Collection[WatchedClient] = ()) -> str:
        late = [one for one in self._late(self._release_within_s, now_s, released) if not one.is_overdue]
        for client in late:
            client.is_overdue = True
        return _reason(late, cause)

    def _hopeless(self, cause: str, now_s: float, released: Collection[WatchedClient] = ()) -> str:
        return _reason(self._late(2 * self._release_within_s, now_s, released), cause)

    def _late(self, limit_s: float, now_s: float, released: Collection[WatchedClient]) -> list[WatchedClient]:
        return [
            one
            for one in self._clients
            if one not in released and one.exited_at_s is not None and now_s - one.exited_at_s >= limit_s
        ]


def _reason(clients: Sequence[WatchedClient], cause: str) -> str:
    pids = ", ".join(str(client.pid) for client in clients)
    return f"exited and not released in time: process {pids}: {cause}" if clients else ""
