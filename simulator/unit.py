"""One unit in virtual time: the mesh's own memory manager and router queue, around workers that only take time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from decode_svc.room import AHEAD_TOKENS, ask_again_below, blocks_to_ask
from kvstore.admission import WaitingKey
from kvstore.unit import CreditGiven, ModelShare, Unit
from loadtest.record import OK, Record
from muxmesh.config.runtime import Role
from muxmesh.config.schema import ModelConfig, UnitConfig
from muxmesh.cost import COSTS_EVERY_S, ModelCosts
from muxmesh.engine.sim import step_cost
from muxmesh.errors import InvalidRequest
from muxmesh.models.spec import ModelSpec
from muxmesh.order import Order
from muxmesh.types import KvDemand, Lease, LengthPrediction, Standing, blocks_for
from router.queue import Waiting, WaitingRequests
from router.work import UnitWork
from simulator.device import DecodeJob, DecodeWorker, Device, PrefillJob, PrefillWorker, Worker
from simulator.timeline import NO_DELAYS, Delays, Timeline

_ROUTER = "router"


@dataclass(slots=True)
class Request:
    """One request on its way. ``num_output``: how long its answer will have been. ``arrived`` is its standing before
    any of it was computed. ``on_end`` is called once.
    """

    index: int
    model: str
    num_prompt: int
    num_output: int
    most_new_tokens: int
    arrived: Standing
    prediction: LengthPrediction
    record: Record
    on_end: Callable[[Request], None]
    hashes: tuple[bytes, ...] = ()
    num_sent: int = 0
    key_id: int = 0

    @property
    def standing(self) -> Standing:
        """Of the request as it waits: what it has had of its answer is behind it, its prompt is not."""
        return self.arrived.after(self.num_sent, self.prediction, prefill_again=True)


@dataclass(frozen=True, slots=True)
class Decision:
    """A credit: who was let in, and why then."""

    at_s: float
    number: int
    index: int
    model: str
    num_overtaken: int
    reason: str


@dataclass(slots=True)
class _Served:
    """One model of the unit."""

    config: ModelConfig
    prefill: PrefillWorker
    decode: DecodeWorker
    prefill_name: str
    decode_name: str
    costs: ModelCosts | None = None


@dataclass(slots=True)
class _Decoding:
    request: Request
    lease: Lease
    num_blocks: int
    must_go: bool = False
    job: DecodeJob = field(init=False)


class SimulatedUnit:
    """Owns a `kvstore.unit.Unit`, the queue that a router shows it, and the device."""

    def __init__(
        self,
        timeline: Timeline,
        config: UnitConfig,
        specs: Mapping[str, ModelSpec],
        order: Order,
        on_decision: Callable[[Decision], None] | None = None,
        delays: Delays = NO_DELAYS,
    ) -> None:
        shares = {}
        for model in config.models:
            spec = specs[model.name]
            shares[model.name] = ModelShare(
                spec.kv_shape(model.block_size, model.dtype),
                model.max_num_seqs,
                model.max_model_len or spec.context_len,
                config.guaranteed_slabs(model),
            )
        self.unit = Unit(config.kv_pool, config.slab, shares, order=order)
        self._timeline = timeline
        self._order = order
        self._on_decision = on_decision
        self._queue = WaitingRequests(order)
        self._waiting: dict[int, Request] = {}
        self._decoding: dict[int, _Decoding] = {}
        self._served = {model.name: self._open(model, order) for model in config.models}
        workers: list[Worker] = []
        for served in self._served.values():  # slots in the order in which the supervisor starts workers
            workers += [served.prefill, served.decode]
        self._delays = delays
        self._device = Device(timeline, workers, delays)
        self._last_key_id = 0
        self._costs_due_s = 0.0
        self._timer_s: float | None = None
        self.num_requeued = 0
        self.work = UnitWork()

    @property
    def num_waiting(self) -> int:
        """Requests that have no credit."""
        return len(self._queue)

    def num_waiting_for(self, model: str) -> int:
        """Requests of one model that have no credit."""
        return self._queue.count(model)

    @property
    def busy_s(self) -> float:
        """Seconds in which the device computed."""
        return self._device.busy_s

    def costs(self, model: str) -> ModelCosts | None:
        """What the router knows of the model's steps."""
        return self._served[model].costs

    def wait(self, request: Request) -> None:
        """A request waits for a credit."""
        self._last_key_id += 1
        request.key_id = self._last_key_id
        self._waiting[request.key_id] = request
        self._queue.add(Waiting(request.key_id, request.model, request.standing, self._demand(request)))
        self._show()
        self._changed()

    def _open(self, model: ModelConfig, order: Order) -> _Served:
        names = []
        for role in Role:
            worker = self.unit.attach(role, model.name, "", 0)
            worker.ready = True
            names.append(worker.name)
        cost, budget = step_cost(model.sim), max(model.prefill_token_budget, model.max_num_seqs)
        prefill = PrefillWorker(cost, order, budget, model.max_num_seqs)
        return _Served(model, prefill, DecodeWorker(cost), names[0], names[1])

    def _demand(self, request: Request) -> KvDemand:
        num_known = request.num_prompt + request.num_sent
        most = request.num_prompt + request.most_new_tokens
        num_tokens = min(most, num_known + self._served[request.model].config.kv_answer_tokens)
        return KvDemand(num_tokens, most, request.hashes, num_known - 1 if request.hashes else 0)

    def _show(self) -> bool:
        """Shows the unit what it has not seen and should; True if there was anything."""
        anything = False
        for waiting in self._queue.show_next(self._timeline.now_s):
            key = WaitingKey(_ROUTER, waiting.key_id, waiting.model, waiting.standing, waiting.demand)
            anything = True
            try:
                self.unit.offer(key)
            except InvalidRequest as error:
                self._queue.remove(waiting.key_id)
                request = self._waiting.pop(waiting.key_id)
                request.record.status, request.record.error = "INVALID_ARGUMENT", str(error)
                self._end(request)
        return anything

    def _changed(self) -> None:
        """As in kvstore's service: room or demand changed, so room is given out, and costs are told now and then."""
        now_s = self._timeline.now_s
        given = self.unit.give_room(now_s, now_s)
        for credit in given.credits:
            self._start(credit)
        for asked in given.give_way:
            if (decoding := self._decoding.get(asked.lease_id)) is not None and decoding.job.joined_at >= 0:
                decoding.must_go = True
                self._served[decoding.request.model].decode.halt_next(decoding.job)
                self._device.wake()
        if now_s >= self._costs_due_s:
            self._costs_due_s = now_s + COSTS_EVERY_S
            for served in self._served.values():
                if served.prefill.fit.cost and served.decode.fit.cost:
                    served.costs = ModelCosts(served.prefill.fit.cost, served.decode.fit.cost)
        due_s = self.unit.next_change_s()
        if due_s is not None and due_s != self._timer_s:
            self._timer_s = due_s
            self._timeline.at(due_s, self._changed)
        if given.credits and self._show():
            self._changed()

    def _start(self, credit: CreditGiven) -> None:
        request = self._waiting.pop(credit.key_id)
        self._queue.remove(credit.key_id)
        served = self._served[request.model]
        if self._on_decision is not None:
            now_s, reason = self._timeline.now_s, self._order.reason(credit.standing, self._timeline.now_s)
            self._on_decision(
                Decision(now_s, credit.decision, request.index, request.model, credit.num_overtaken, reason)
            )
        lease = self.unit.acquire(credit.lease.ref, served.prefill_name)
        num_uncomputed = request.num_prompt + request.num_sent - lease.num_computed_tokens
        if request.num_sent == 0:
            request.record.num_cached = lease.num_computed_tokens
        job = PrefillJob(
            request.standing, lease.num_computed_tokens, num_uncomputed, lambda: self._prefilled(request, lease)
        )
        self._after(self._delays.admit_s, lambda: self._add(served.prefill, job))

    def _prefilled(self, request: Request, lease: Lease) -> None:
        """The prompt is computed and one more token of the answer drawn."""
        served = self._served[request.model]
        if request.num_sent == 0:
            request.record.pieces.append((self._timeline.now_s, 1))
        request.num_sent += 1
        if request.num_sent >= request.num_output:
            self._finish(request, lease, served.prefill_name)
            return
        num_known = request.num_prompt + request.num_sent
        lease = self.unit.move(lease.ref, served.prefill_name, served.decode_name, num_known - 1, (0,), b"")
        decoding = _Decoding(request, lease, len(lease.block_ids))
        decoding.job = DecodeJob(
            num_known - 1,
            request.num_output - request.num_sent,
            done=lambda: self._decoded(decoding),
            next_halt=lambda: self._tokens_until_asking(decoding),
            halt=lambda: self._grow(decoding),
        )
        self._decoding[lease.ref.lease_id] = decoding
        self._after(self._delays.hand_off_s, lambda: self._add(served.decode, decoding.job))

    def _add(self, worker: PrefillWorker | DecodeWorker, job: Any) -> None:
        worker.add(job)
        self._device.wake()

    def _after(self, delay_s: float, happen: Callable[[], None]) -> None:
        if delay_s > 0:
            self._timeline.at(self._timeline.now_s + delay_s, happen)
        else:
            happen()

    def _tokens_until_asking(self, decoding: _Decoding) -> int | None:
        """Tokens until the blocks have room for fewer than `AHEAD_TOKENS`; None: they hold the longest answer."""
        request, block_size = decoding.request, self._served[decoding.request.model].config.block_size
        if decoding.num_blocks >= blocks_for(request.num_prompt + request.most_new_tokens, block_size):
            return None
        room = self._room(decoding)
        return room - AHEAD_TOKENS + 1 if room >= AHEAD_TOKENS else ask_again_below(room)

    def _room(self, decoding: _Decoding) -> int:
        request, served = decoding.request, self._served[decoding.request.model]
        num_tokens = request.num_prompt + request.num_sent + served.decode.progress(decoding.job)
        return decoding.num_blocks * served.config.block_size - num_tokens

    def _grow(self, decoding: _Decoding) -> None:
        """More blocks, half as many if there are none, and so on; without any and without room it gives way."""
        request, served = decoding.request, self._served[decoding.request.model]
        if decoding.must_go:
            self._give_way(decoding)
            return
        block_size = served.config.block_size
        most = blocks_for(request.num_prompt + request.most_new_tokens, block_size)
        wanted = blocks_to_ask(decoding.num_blocks, most, block_size)
        while wanted:
            blocks = self.unit.grow(decoding.lease.ref, served.decode_name, wanted)
            if blocks is not None:
                decoding.num_blocks += len(blocks)
                break
            wanted //= 2
        if wanted or self._room(decoding) > 0:
            served.decode.watch(decoding.job)
        else:
            self._give_way(decoding)

    def _give_way(self, decoding: _Decoding) -> None:
        """Without swap: its KV is dropped, and the request waits again, with all its tokens, at its place."""
        request, served = decoding.request, self._served[decoding.request.model]
        request.num_sent += served.decode.progress(decoding.job)
        served.decode.take_out(decoding.job)
        del self._decoding[decoding.lease.ref.lease_id]
        self.unit.release(decoding.lease.ref, served.decode_name, request.hashes)
        self.num_requeued += 1
        self._device.wake()
        self.wait(request)

    def _decoded(self, decoding: _Decoding) -> None:
        request = decoding.request
        request.num_sent = request.num_output
        del self._decoding[decoding.lease.ref.lease_id]
        self._finish(request, decoding.lease, self._served[request.model].decode_name)

    def _finish(self, request: Request, lease: Lease, owner: str) -> None:
        """The client has its last token; a little later the slot is free."""
        record = request.record
        record.status, record.num_output, record.num_input = OK, request.num_output, request.num_prompt
        record.finish = "LENGTH" if request.num_output >= request.most_new_tokens else "EOS"
        if request.num_output > 1:
            record.pieces.append((self._timeline.now_s, request.num_output - 1))
        self._end(request)
        self._after(self._delays.end_s, lambda: self._release(request, lease, owner))

    def _release(self, request: Request, lease: Lease, owner: str) -> None:
        self.unit.release(lease.ref, owner, request.hashes)
        self._changed()

    def _end(self, request: Request) -> None:
        request.record.ended_s = self._timeline.now_s
        request.on_end(request)
