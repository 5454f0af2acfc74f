"""The connection of a client to its mesh: channels, the wait for a connection, and errors in plain words.

gRPC ties a channel to the event loop that it was opened on, so there is one for each loop, opened by the first call.
In a process that was forked after a channel was opened, gRPC may hang or abort: `refuse_inherited` reports it.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import grpc

from muxmesh.addresses import check_address, is_loopback
from muxmesh.client.retries import Attempts
from muxmesh.client.tls import Tls, read_credentials
from muxmesh.client.tls_errors import closed_hint, tls_problem
from muxmesh.errors import DeadlineExceeded, InvalidRequest, MeshError, RequestAborted, TlsFailed, Unavailable
from muxmesh.rpc.limits import MAX_MESSAGE_BYTES
from muxmesh.rpc.status_codes import from_rpc_error
from muxmesh.v1 import inference_pb2_grpc, mesh_pb2_grpc

_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.lb_policy_name", "round_robin"),
    ("grpc.use_local_subchannel_pool", 1),
    # A router restarts within seconds, so reconnects do not back off for long.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
)
_STATUS_DETAILS = "grpc-status-details-bin"


_connected_pids: set[int] = set()
"""This process and those it was forked from, as far as they have opened a channel."""


@dataclass(frozen=True, slots=True)
class Stubs:
    """A channel with the stubs of the public services."""

    channel: grpc.aio.Channel
    inference: inference_pb2_grpc.InferenceAsyncStub
    mesh: mesh_pb2_grpc.MeshAsyncStub


class MeshConnection:
    """Opens channels to one address, on the event loop that calls. Closed once, it stays closed."""

    def __init__(self, address: str, connect_timeout_s: float | None, tls: Tls | bool = False) -> None:
        """Raises InvalidRequest for an address that cannot be one, and for files of ``tls`` that cannot be used.

        ``connect_timeout_s`` None waits without limit.
        """
        self.address = check_address(address)
        self._tls = read_credentials(tls)
        self._connect_timeout_s = connect_timeout_s
        self._stubs: dict[asyncio.AbstractEventLoop, Stubs] = {}
        self._is_closed = False

    async def ready(self, remaining_s: float | None) -> Stubs:
        """Waits until the mesh is connected or an attempt to connect has failed, so that a call reports why.

        Raises Unavailable after the connect timeout, and DeadlineExceeded if ``remaining_s`` passes before it.
        """
        stubs = self._open()
        limits_s = [limit_s for limit_s in (remaining_s, self._connect_timeout_s) if limit_s is not None]
        limit_s = min(limits_s, default=None)
        try:
            async with asyncio.timeout(limit_s):
                while (state := stubs.channel.get_state(try_to_connect=True)) in _UNDECIDED:
                    await stubs.channel.wait_for_state_change(state)
        except TimeoutError:
            raise (
                _deadline_passed() if limit_s == remaining_s else self._no_answer(f"no connection in {limit_s:g} s")
            ) from None
        self._refuse_closed()
        return stubs

    async def close(self) -> None:
        """Closes all channels. Calls in progress end with RequestAborted. A second close has no effect."""
        self._is_closed = True
        while self._stubs:
            loop, stubs = self._stubs.popitem()
            if loop is asyncio.get_running_loop():
                await stubs.channel.close()
            elif loop.is_running():
                await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(stubs.channel.close(), loop))

    @contextmanager
    def errors(self, attempts: Attempts) -> Iterator[None]:
        """Maps gRPC errors to those of the mesh."""
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise self._mesh_error(error, attempts.has_begun) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._is_closed or (task is not None and task.cancelling()):
                raise
            raise RequestAborted("the client was closed") from None  # closing a channel cancels its calls locally

    def _open(self) -> Stubs:
        self._refuse_closed()
        refuse_inherited()
        loop = asyncio.get_running_loop()
        if loop not in self._stubs:
            for other in [other for other in self._stubs if other.is_closed()]:
                del self._stubs[other]
            _connected_pids.add(os.getpid())
            channel = self._channel()
            self._stubs[loop] = Stubs(
                channel, inference_pb2_grpc.InferenceStub(channel), mesh_pb2_grpc.MeshStub(channel)
            )
        return self._stubs[loop]

    def _channel(self) -> grpc.aio.Channel:
        if self._tls is None:
            return grpc.aio.insecure_channel(self.address, options=self._options())
        options = (*self._options(), *self._tls.options)
        return grpc.aio.secure_channel(self.address, self._tls.credentials, options=options)

    def _options(self) -> tuple[tuple[str, str | int], ...]:
        # An HTTP proxy of the environment cannot reach a mesh on this machine.
        return (*_OPTIONS, ("grpc.enable_http_proxy", 0)) if is_loopback(self.address) else _OPTIONS

    def _refuse_closed(self) -> None:
        if self._is_closed:
            raise RequestAborted("the client is closed")

    def _mesh_error(self, error: grpc.aio.AioRpcError, has_begun: bool) -> MeshError:
        """The error of the mesh, as it sent it; or an error of gRPC itself in words of the mesh."""
        if any(key == _STATUS_DETAILS for key, _ in error.trailing_metadata() or ()):
            return from_rpc_error(error)
        details = error.details() or error.code().name
        match error.code():
            case grpc.StatusCode.DEADLINE_EXCEEDED:
                return _deadline_passed()
            case grpc.StatusCode.UNAVAILABLE if has_begun:
                return Unavailable(f"the connection to {self.address} was lost ({connection_reason(details)})")
            case grpc.StatusCode.UNAVAILABLE:
                reason = connection_reason(details)
                if (problem := tls_problem(reason)) is not None:
                    return TlsFailed(f"no TLS connection to {self.address}: {problem}")
                return self._no_answer(reason, closed_hint(reason, self._tls))
            case grpc.StatusCode.UNIMPLEMENTED:
                return InvalidRequest(
                    "address", f"{self.address} is no MuxMesh router, or of another version ({details})"
                )
        return from_rpc_error(error)

    def _no_answer(self, reason: str, hint: str | None = None) -> Unavailable:
        remedy = hint or "start one with `muxmesh up`, or set another address"
        return Unavailable(f"no mesh answers at {self.address} ({reason}); {remedy}")


def refuse_inherited() -> None:
    """Raises RequestAborted if a channel was opened before this process was forked, closed or not."""
    if _connected_pids - {os.getpid()}:
        raise RequestAborted(
            "a client was connected before this process was forked, after which gRPC does not work; fork before the "
            "first call, or start processes with `spawn`"
        )


def _deadline_passed() -> DeadlineExceeded:
    return DeadlineExceeded("the deadline passed before the call was complete")


def connection_reason(details: str) -> str:
    """The cause in the details of gRPC, without what the message says already."""
    return _PREAMBLE.sub("", details.rpartition("last error: ")[2])


_PREAMBLE = re.compile(r"^([A-Z_]+: )?((ipv[46]|unix|vsock)\S*: )?(Failed to connect to remote host: )?")
_UNDECIDED = (grpc.ChannelConnectivity.IDLE, grpc.ChannelConnectivity.CONNECTING)
