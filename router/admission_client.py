"""The router's side of admission: shows one unit the best queued requests and assigns its credits to them.

Does not choose the unit (`router.units`) and does not call workers (`router.attempt`).
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from muxmesh.background_task import background
from muxmesh.clock import Clock
from muxmesh.errors import InvalidRequest, ModelNotFound, Unavailable
from muxmesh.internal.v1 import kvstore_pb2, kvstore_pb2_grpc
from muxmesh.rpc import convert
from muxmesh.scheduling_policy import SchedulingPolicy
from muxmesh.step_cost import ModelCosts
from muxmesh.types import NO_WAITS, KvDemand, LeaseRef, QueuedRequest, SchedulingState, Waits
from muxmesh.unloaded_latency import UnloadedCosts
from router.request_queue import RequestQueue

_log = logging.getLogger(__name__)
_RECONNECT_S = 0.1
_LOOK_EVERY_S, _EXPLAIN_AFTER = 1.0, 10
"""A unit that is not connected at so many looks in a row gets a log line with the reason."""
_EXPLAIN_TIMEOUT_S = 5.0
_Outbox = asyncio.Queue[kvstore_pb2.AdmitRequest | None]


class UnitLost(Unavailable):
    """The connection to the unit broke while a request was queued there. It never leaves the router."""


@dataclass(frozen=True, slots=True)
class ReportedLoad:
    """What other routers have of a model on a unit, and whether the model is asleep; see `kvstore.router_loads`."""

    is_asleep: bool = False
    num_sequences: int = 0
    prefill_tokens: int = 0
    prefill_context: int = 0


NO_REPORT = ReportedLoad()


@dataclass(frozen=True, slots=True)
class Credit:
    """The right to send one request to these two workers. The unit has reserved its KV blocks and its decode slot.

    ``decision`` counts the credits of the unit from 1. ``num_overtaken``: queued requests of the same model and
    priority that arrived before this one and still wait. ``scheduling`` is the state by which the unit ordered the
    request: cached prompt tokens are not part of its work, it has the standing of its tenant, and its arrival is by the
    unit's clock. ``waits``: what it
    waited for, since it was queued here.
    """

    lease: LeaseRef
    prefill_worker: str
    prefill_address: str
    decode_worker: str
    decode_address: str
    decision: int
    num_overtaken: int
    scheduling: SchedulingState
    waits: Waits = NO_WAITS


class UnitAdmission:
    """Owns the Admit stream to one unit, and the requests that wait for its credits.

    Reconnects until cancelled. Queued requests keep waiting while the unit restarts, and are shown to it again.
    """

    def __init__(
        self,
        unit: str,
        router: str,
        channel: grpc.aio.Channel,
        clock: Clock,
        policy: SchedulingPolicy,
        is_fair: bool = True,
    ) -> None:
        """``router``: name of this router, unique in the mesh. ``is_fair``: see `RequestQueue`."""
        self._unit = unit
        self._clock = clock
        self._router = router
        self._stub = kvstore_pb2_grpc.KvStoreServiceStub(channel)
        self._health = health_pb2_grpc.HealthStub(channel)
        self._queue = RequestQueue(policy, is_fair=is_fair)
        self.costs: dict[str, ModelCosts] = {}
        """Step costs by model, as last reported by the unit."""
        self.unloaded: defaultdict[str, UnloadedCosts] = defaultdict(UnloadedCosts)
        """Step costs by model from which SLOs are computed."""
        self.fingerprints: dict[str, str] = {}
        """Fingerprints of the weights by model, as the unit has them. Empty before the first connection."""
        self.loads: dict[str, ReportedLoad] = {}
        """By model, as last reported by the connected unit."""
        self._futures: dict[int, asyncio.Future[Credit]] = {}
        self._leaving: set[int] = set()
        """Those of ``_futures`` that do not wait until a lost unit is back."""
        self._outbox: _Outbox = asyncio.Queue()
        self._last_entry_id = 0
        self._shown_at_s: dict[int, float] = {}
        self._connected_at_s = 0.0
        self.connected = asyncio.Event()

    def num_queued(self, model: str) -> int:
        """Requests for ``model`` that wait for a credit of this unit."""
        return self._queue.count(model)

    def num_before(self, model: str, tenant: str, scheduling: SchedulingState, weight: float = 1.0) -> int:
        """See `RequestQueue.num_before`."""
        return self._queue.num_before(model, tenant, scheduling, weight)

    def oldest_arrival_s(self, model: str) -> float | None:
        """See `RequestQueue.oldest_arrival_s`."""
        return self._queue.oldest_arrival_s(model)

    async def wait_for_credit(
        self,
        model: str,
        tenant: str,
        scheduling: SchedulingState,
        demand: KvDemand,
        tenant_weight: float = 1.0,
        leaves_when_lost: bool = False,
    ) -> Credit:
        """Waits until the unit has reserved the request's initial demand. Cancelling the wait withdraws the request.

        The unit issues credits in the mesh's order, over all routers and tenants. Raises InvalidRequest if even an
        empty unit could not hold the request, ModelNotFound if the unit does not serve the model, and with
        ``leaves_when_lost`` UnitLost when the connection breaks. Without it, the request is queued again when the unit
        is back.
        """
        self._last_entry_id += 1
        entry_id = self._last_entry_id
        future: asyncio.Future[Credit] = asyncio.get_running_loop().create_future()
        self._futures[entry_id] = future
        if leaves_when_lost:
            self._leaving.add(entry_id)
        queued_at_s = self._clock.monotonic_s()
        self._queue.add(QueuedRequest(entry_id, model, scheduling, demand, tenant, tenant_weight))
        self._show_next()
        try:
            credit = await future
            waits = self._waits_before_shown(entry_id, queued_at_s).plus(credit.waits)
            return replace(credit, waits=waits)
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                self.return_credit(future.result())
            raise
        finally:
            del self._futures[entry_id]
            self._leaving.discard(entry_id)
            self._shown_at_s.pop(entry_id, None)
            if self._queue.remove(entry_id):
                self._outbox.put_nowait(kvstore_pb2.AdmitRequest(withdraw=entry_id))
                self._show_next()

    def _waits_before_shown(self, entry_id: int, queued_at_s: float) -> Waits:
        """What a request waited for until the unit knew of it: the unit itself, or others that this router showed."""
        seconds = self._shown_at_s.get(entry_id, queued_at_s) - queued_at_s
        return Waits(worker_s=seconds) if self._connected_at_s > queued_at_s else Waits(order_s=seconds)

    def return_credit(self, credit: Credit) -> None:
        """Returns an unused credit to the unit. Has no effect once a worker has acquired the lease."""
        self._outbox.put_nowait(kvstore_pb2.AdmitRequest(return_credit=convert.ref_to_wire(credit.lease)))

    async def run(self) -> None:
        """Opens the stream, and opens it again whenever it breaks, until cancelled."""
        async with background(self._explain_waiting(), f"reasons why {self._unit} is not connected"):
            await self._keep_open()

    async def _explain_waiting(self) -> None:
        """Logs why the unit is not connected: once, and again if the reason changes."""
        explained, num_looks = "", 0
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            num_looks += 1
            if self.connected.is_set():
                explained, num_looks = "", 0
            elif num_looks % _EXPLAIN_AFTER == 0:
                reason = await self._reason_for_waiting()
                if reason != explained and not self.connected.is_set():
                    _log.warning("unit %s is not connected yet: %s", self._unit, reason)
                    explained = reason

    async def _reason_for_waiting(self) -> str:
        """The error of a call that does not wait until there is a connection, as the stream does."""
        try:
            await self._health.Check(health_pb2.HealthCheckRequest(), timeout=_EXPLAIN_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            return error.details() or error.code().name
        return "it responds, but has not said yet what it serves"

    async def _keep_open(self) -> None:
        while True:
            try:
                await self._run_stream()
            except grpc.aio.AioRpcError as error:
                if self.connected.is_set():
                    _log.warning("unit %s is unreachable: %s", self._unit, error.details())
            if self.connected.is_set():
                self._on_lost()
            await asyncio.sleep(_RECONNECT_S)

    def _on_lost(self) -> None:
        self.connected.clear()
        self.loads = {}
        for entry_id in self._leaving:
            if not (future := self._futures[entry_id]).done():
                future.set_exception(UnitLost(f"the connection to unit {self._unit} broke"))

    async def _run_stream(self) -> None:
        outbox = self._outbox = asyncio.Queue()  # with a stream, the unit drops its requests and credits
        self._queue.hide_all()
        call = self._stub.Admit(self._messages(outbox), wait_for_ready=True)
        try:
            async for response in call:
                self._on_response(response)
                if not self.connected.is_set():  # the first message tells what the unit serves
                    self.connected.set()
                    self._connected_at_s = self._clock.monotonic_s()
                    self._show_next()
        finally:
            call.cancel()
            outbox.put_nowait(None)

    async def _messages(self, outbox: _Outbox) -> AsyncIterator[kvstore_pb2.AdmitRequest]:
        yield kvstore_pb2.AdmitRequest(hello=kvstore_pb2.RouterHello(router=self._router))
        while (message := await outbox.get()) is not None:
            yield message

    def _show_next(self) -> None:
        if not self.connected.is_set():
            return
        unix_s = self._clock.unix_s()
        for request in self._queue.show_next(unix_s):
            self._shown_at_s[request.entry_id] = self._clock.monotonic_s()
            offer = convert.queued_to_wire(request)
            self._outbox.put_nowait(kvstore_pb2.AdmitRequest(offer=offer, sent_at_unix_s=unix_s))

    def _on_response(self, response: kvstore_pb2.AdmitResponse) -> None:
        kind = response.WhichOneof("message")
        if kind == "hello":
            self.fingerprints = {one.model: one.fingerprint for one in response.hello.models}
        elif kind == "costs":
            self._on_costs(response.costs)
        elif kind == "loads":
            self.loads = {one.model: _load_from_wire(one) for one in response.loads.models}
        elif kind == "refused":
            self._on_refused(response.refused)
            self._show_next()
        elif kind == "credit":
            self._on_credit(response.credit)
            self._show_next()

    def _on_costs(self, costs: kvstore_pb2.UnitCosts) -> None:
        for cost in costs.models:
            both = ModelCosts(convert.cost_from_wire(cost.prefill), convert.cost_from_wire(cost.decode))
            self.costs[cost.model] = both
            self.unloaded[cost.model].observe(both)

    def _on_refused(self, refused: kvstore_pb2.RequestRefused) -> None:
        future = self._futures.get(refused.entry_id)
        self._queue.remove(refused.entry_id)
        if future is not None and not future.done():
            not_served = refused.field == "model"
            error = ModelNotFound(f"model: {refused.problem}") if not_served else None
            future.set_exception(error or InvalidRequest(refused.field, refused.problem))

    def _on_credit(self, wire: kvstore_pb2.Credit) -> None:
        credit = Credit(
            convert.ref_from_wire(wire.lease),
            wire.prefill.name,
            wire.prefill.address,
            wire.decode.name,
            wire.decode.address,
            wire.decision,
            wire.num_overtaken,
            convert.scheduling_from_wire(wire.scheduling),
            convert.waits_from_wire(wire.waits),
        )
        future = self._futures.get(wire.entry_id)
        self._queue.remove(wire.entry_id)
        if future is None or future.done():  # the request was withdrawn while its credit was in flight
            self.return_credit(credit)
        else:
            future.set_result(credit)


def _load_from_wire(wire: kvstore_pb2.ModelLoad) -> ReportedLoad:
    return ReportedLoad(wire.is_asleep, wire.num_sequences, wire.prefill_tokens, wire.prefill_context)
