"""The router's end of admission: shows keys to one unit, hands its credits to the requests that wait for them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc

from muxmesh.clock import Clock
from muxmesh.cost import ModelCosts
from muxmesh.errors import InvalidRequest
from muxmesh.internal.v1 import kvstore_pb2, kvstore_pb2_grpc
from muxmesh.order import Order
from muxmesh.rpc import convert
from muxmesh.types import KvDemand, LeaseRef, Standing
from router.queue import Waiting, WaitingRequests

_log = logging.getLogger(__name__)
_RECONNECT_S = 0.1
_Outbox = asyncio.Queue[kvstore_pb2.AdmitRequest | None]


@dataclass(frozen=True, slots=True)
class Credit:
    """The right to send one request to these two workers; its KV and its decode slot are reserved."""

    lease: LeaseRef
    prefill_worker: str
    prefill_address: str
    decode_worker: str
    decode_address: str
    decision: int = 0
    num_overtaken: int = 0
    standing: Standing | None = None
    """What the unit decided by."""


class UnitCredits:
    """Owns the admission stream to one unit. Reconnects for ever; waiting requests do not notice a restart."""

    def __init__(self, router: str, channel: grpc.aio.Channel, clock: Clock, order: Order) -> None:
        self._clock = clock
        self._router = router
        self._stub = kvstore_pb2_grpc.KvStoreServiceStub(channel)
        self._queue = WaitingRequests(order)
        self.costs: dict[str, ModelCosts] = {}
        """What the unit's steps take, by model, as it said last."""
        self._futures: dict[int, asyncio.Future[Credit]] = {}
        self._outbox: _Outbox = asyncio.Queue()
        self._last_key_id = 0
        self.connected = asyncio.Event()

    def num_waiting(self, model: str) -> int:
        """Requests for ``model`` that wait for a credit."""
        return self._queue.count(model)

    async def wait_for_credit(self, model: str, standing: Standing, demand: KvDemand) -> Credit:
        """Waits until the unit has room for what the request needs at first, which is then reserved.

        Raises InvalidRequest if the unit could not hold it even if it were empty. It is
        given in the mesh's order, whatever else waits in this router or in others.
        """
        self._last_key_id += 1
        key_id = self._last_key_id
        future: asyncio.Future[Credit] = asyncio.get_running_loop().create_future()
        self._futures[key_id] = future
        self._queue.add(Waiting(key_id, model, standing, demand))
        self._show_next()
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                self.give_back(future.result())
            raise
        finally:
            del self._futures[key_id]
            if self._queue.remove(key_id):
                self._outbox.put_nowait(kvstore_pb2.AdmitRequest(withdraw=key_id))
                self._show_next()

    def give_back(self, credit: Credit) -> None:
        """A credit that is not used (any more). Without effect once a worker has the lease."""
        self._outbox.put_nowait(kvstore_pb2.AdmitRequest(return_credit=convert.ref_to_wire(credit.lease)))

    async def run(self) -> None:
        """Keeps the stream up until cancelled."""
        while True:
            try:
                await self._one_stream()
            except grpc.aio.AioRpcError as error:
                if self.connected.is_set():
                    _log.warning("the unit is away: %s", error.details())
            self.connected.clear()
            await asyncio.sleep(_RECONNECT_S)

    async def _one_stream(self) -> None:
        outbox = self._outbox = asyncio.Queue()  # what was meant for the old stream died with it
        self._queue.hide_all()
        call = self._stub.Admit(self._requests(outbox), wait_for_ready=True)
        try:
            await call.initial_metadata()
            self.connected.set()
            self._show_next()
            async for response in call:
                self._take(response)
        finally:
            call.cancel()
            outbox.put_nowait(None)

    async def _requests(self, outbox: _Outbox) -> AsyncIterator[kvstore_pb2.AdmitRequest]:
        yield kvstore_pb2.AdmitRequest(hello=kvstore_pb2.RouterHello(router=self._router))
        while (request := await outbox.get()) is not None:
            yield request

    def _show_next(self) -> None:
        if not self.connected.is_set():
            return
        for waiting in self._queue.show_next(self._clock.unix_s()):
            offer = kvstore_pb2.RequestKey(
                key_id=waiting.key_id,
                model=waiting.model,
                standing=convert.standing_to_wire(waiting.standing),
                demand=convert.demand_to_wire(waiting.demand),
            )
            self._outbox.put_nowait(kvstore_pb2.AdmitRequest(offer=offer))

    def _take(self, response: kvstore_pb2.AdmitResponse) -> None:
        kind = response.WhichOneof("message")
        if kind == "costs":
            for cost in response.costs.models:
                both = ModelCosts(convert.cost_from_wire(cost.prefill), convert.cost_from_wire(cost.decode))
                self.costs[cost.model] = both
            return
        if kind == "refused":
            future = self._futures.get(response.refused.key_id)
            self._queue.remove(response.refused.key_id)
            if future is not None and not future.done():
                field, _, problem = response.refused.reason.partition(": ")
                future.set_exception(InvalidRequest(field, problem))
        else:
            wire = response.credit
            credit = Credit(
                convert.ref_from_wire(wire.lease),
                wire.prefill.name,
                wire.prefill.address,
                wire.decode.name,
                wire.decode.address,
                wire.decision,
                wire.num_overtaken,
                convert.standing_from_wire(wire.standing),
            )
            future = self._futures.get(wire.key_id)
            self._queue.remove(wire.key_id)
            if future is None or future.done():  # it was withdrawn while the credit was on its way
                self.give_back(credit)
            else:
                future.set_result(credit)
        self._show_next()
