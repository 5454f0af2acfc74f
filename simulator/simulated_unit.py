"""One unit in virtual time: the mesh's own unit state, router queue and block growth, around simulated workers.

Takes the steps of a request from the queue to the release of its lease. It knows no swap tier and no network: a
pre-empted sequence is computed again, and `Delays` stand for the messages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from kvstore.unit import IssuedCredit, Unit
from kvstore.unit_model import UnitModel
from loadtest.record import OK, Record
from muxmesh.block_hashes import demand_for
from muxmesh.config.schema import ModelConfig, UnitConfig
from muxmesh.engine.sim_runner import sim_step_cost
from muxmesh.errors import InvalidRequest
from muxmesh.models.model_spec import ModelSpec
from muxmesh.scheduling_policy import SchedulingPolicy
from muxmesh.step_cost import ModelCosts
from muxmesh.types import Lease, LengthPrediction, QueuedRequest, Role, SchedulingState, blocks_for
from router.expected_work import ExpectedWork, ModelService
from router.request_queue import RequestQueue
from simulator.simulated_device import DecodeJob, DecodeWorker, Device, PrefillJob, PrefillWorker, Worker
from simulator.timeline import NO_DELAYS, Delays, Timeline
from worker.block_growth import BlockGrowth

_ROUTER = "router"


@dataclass(slots=True)
class SimulatedRequest:
    """One request with its progress. All numbers are tokens."""

    index: int
    model: str
    num_prompt: int
    num_output: int
    """The length that the output will have."""
    max_new_tokens: int
    arrived: SchedulingState
    """Before anything was computed."""
    prediction: LengthPrediction
    record: Record
    """Filled in with times, tokens and status."""
    on_end: Callable[[SimulatedRequest], None]
    """Called once, when the record is complete."""
    hashes: tuple[bytes, ...] = ()
    """Block hashes of the prompt; empty: it does not use the prefix cache."""
    num_sent: int = 0
    """Output tokens sampled so far."""
    entry_id: int = 0

    @property
    def max_tokens(self) -> int:
        """Tokens of the prompt and the longest possible output."""
        return self.num_prompt + self.max_new_tokens

    @property
    def scheduling(self) -> SchedulingState:
        """The state while the request is queued: the KV of its prompt has to be computed, again after a pre-emption."""
        return self.arrived.after_output(self.num_sent, self.prediction, prefill_again=True)


@dataclass(frozen=True, slots=True)
class Decision:
    """An admission: the ``number``-th credit, the request that it was issued to, and the reason of its position."""

    at_s: float
    number: int
    index: int
    model: str
    num_overtaken: int
    reason: str


@dataclass(slots=True)
class _ServedModel:
    """One model of the unit, with its workers and their names."""

    config: ModelConfig
    prefill: PrefillWorker
    decode: DecodeWorker
    prefill_name: str
    decode_name: str
    costs: ModelCosts | None = None


@dataclass(slots=True)
class _DecodingSequence:
    """A sequence between its hand-off and its last token. ``num_blocks``: token blocks of its lease."""

    request: SimulatedRequest
    lease: Lease
    num_blocks: int
    growth: BlockGrowth
    is_preempted: bool = False
    job: DecodeJob = field(init=False)


class SimulatedUnit:
    """Owns a `kvstore.unit.Unit`, a router's queue for it, and the device."""

    def __init__(
        self,
        timeline: Timeline,
        config: UnitConfig,
        specs: Mapping[str, ModelSpec],
        policy: SchedulingPolicy,
        on_decision: Callable[[Decision], None] | None = None,
        delays: Delays = NO_DELAYS,
    ) -> None:
        models = {model.name: UnitModel.of(config, model, specs[model.name]) for model in config.models}
        self.unit = Unit(config.kv_pool, config.slab, models, policy=policy)
        self.expected_work = ExpectedWork()
        self.num_requeued = 0
        self._timeline = timeline
        self._policy = policy
        self._on_decision = on_decision
        self._queue = RequestQueue(policy)
        self._waiting: dict[int, SimulatedRequest] = {}
        self._decoding: dict[int, _DecodingSequence] = {}
        self._served = {model.name: self._attach(model, policy) for model in config.models}
        workers: list[Worker] = []
        for served in self._served.values():  # slots in the order in which the supervisor starts workers
            workers += [served.prefill, served.decode]
        self._delays = delays
        self._device = Device(timeline, workers, delays)
        self.num_running: Counter[str] = Counter()
        """Sequences with a credit, by model."""
        self._last_entry_id = 0
        self._timer_s: float | None = None

    @property
    def num_waiting(self) -> int:
        """Requests without a credit."""
        return len(self._queue)

    def num_queued(self, model: str) -> int:
        """Requests of one model without a credit."""
        return self._queue.count(model)

    @property
    def busy_s(self) -> float:
        """Seconds in which the device computed."""
        return self._device.busy_s

    def service(self, model: str) -> ModelService:
        """The router's view of a model on this unit, with the step costs that the workers reported last."""
        served = self._served[model]
        return ModelService(model, served.costs, served.config.step_token_budget)

    def enqueue(self, request: SimulatedRequest) -> None:
        """Queues a request for a credit. A request that the unit can never serve ends at once, with an error."""
        self._last_entry_id += 1
        request.entry_id = self._last_entry_id
        self._waiting[request.entry_id] = request
        num_known, config = request.num_prompt + request.num_sent, self._served[request.model].config
        demand = demand_for(
            num_known, request.max_tokens, config.kv_answer_tokens, request.hashes, use_cache=bool(request.hashes)
        )
        self._queue.add(QueuedRequest(request.entry_id, request.model, request.scheduling, demand))
        self._show_next()
        self._schedule()

    def _attach(self, model: ModelConfig, policy: SchedulingPolicy) -> _ServedModel:
        """Attaches the workers of a model, which are ready at once."""
        names = []
        for role in Role:
            worker = self.unit.attach(role, model.name, "", 0)
            worker.ready = True
            names.append(worker.name)
        cost = sim_step_cost(model.sim)
        prefill = PrefillWorker(cost, policy, model.step_token_budget, model.max_num_seqs)
        return _ServedModel(model, prefill, DecodeWorker(cost), names[0], names[1])

    def _show_next(self) -> bool:
        """Shows the unit the next requests of the queue; True if there were any."""
        shown = self._queue.show_next(self._timeline.now_s)
        for queued in shown:
            try:
                self.unit.offer(_ROUTER, queued)
            except InvalidRequest as error:
                self._queue.remove(queued.entry_id)
                request = self._waiting.pop(queued.entry_id)
                request.record.status, request.record.error = "INVALID_ARGUMENT", str(error)
                self._end(request)
        return bool(shown)

    def _schedule(self) -> None:
        """Schedules the unit and carries out its decisions. Called, as by kvstore's service, when capacity or demand
        changed, or when the unit has to act on time that has passed.
        """
        now_s = self._timeline.now_s
        decisions = self.unit.schedule(now_s, now_s)
        for credit in decisions.credits:
            self._admit(credit)
        for preemption in decisions.preemptions:
            sequence = self._decoding.get(preemption.lease_id)
            if sequence is not None and sequence.job.joined_at >= 0:
                sequence.is_preempted = True
                self._served[sequence.request.model].decode.check_soon(sequence.job)
                self._device.wake()
        if self.unit.costs_are_due(now_s):
            for served in self._served.values():
                if served.prefill.fit.cost and served.decode.fit.cost:
                    served.costs = ModelCosts(served.prefill.fit.cost, served.decode.fit.cost)
        due_s = self.unit.next_change_s()
        if due_s is not None and due_s != self._timer_s:
            self._timer_s = due_s
            self._timeline.at(due_s, self._schedule)
        if decisions.credits and self._show_next():
            self._schedule()

    def _admit(self, credit: IssuedCredit) -> None:
        request = self._waiting.pop(credit.entry_id)
        self._queue.remove(credit.entry_id)
        self.num_running[request.model] += 1
        served = self._served[request.model]
        if self._on_decision is not None:
            now_s = self._timeline.now_s
            reason = self._policy.reason(credit.scheduling, now_s)
            self._on_decision(
                Decision(now_s, credit.decision, request.index, request.model, credit.num_overtaken, reason)
            )
        lease = self.unit.acquire(credit.lease.ref, served.prefill_name)
        num_uncomputed = request.num_prompt + request.num_sent - lease.num_computed_tokens
        if request.num_sent == 0:
            request.record.num_cached = lease.num_computed_tokens
        job = PrefillJob(
            credit.scheduling, lease.num_computed_tokens, num_uncomputed, lambda: self._on_prefilled(request, lease)
        )
        self._timeline.after(self._delays.admit_s, lambda: self._add_prefill(served, job))

    def _on_prefilled(self, request: SimulatedRequest, lease: Lease) -> None:
        """The known tokens are computed and one more is sampled: finishes, or hands off to the decode worker."""
        served = self._served[request.model]
        if request.num_sent == 0:
            request.record.pieces.append((self._timeline.now_s, 1))
        request.num_sent += 1
        if request.num_sent >= request.num_output:
            self._finish(request, lease, served.prefill_name)
            return
        num_known, block_size = request.num_prompt + request.num_sent, served.config.block_size
        lease = self.unit.move(lease.ref, served.prefill_name, served.decode_name, num_known - 1, (0,))
        growth = BlockGrowth(block_size, blocks_for(request.max_tokens, block_size))
        sequence = _DecodingSequence(request, lease, len(lease.block_ids), growth)
        sequence.job = DecodeJob(
            num_known - 1,
            request.num_output - request.num_sent,
            done=lambda: self._on_decoded(sequence),
            next_check=lambda: growth.tokens_until_request(sequence.num_blocks, self._num_free_slots(sequence)),
            check=lambda: self._check(sequence),
        )
        self._decoding[lease.ref.lease_id] = sequence
        self._timeline.after(self._delays.hand_off_s, lambda: self._add_decode(served, sequence.job))

    def _add_prefill(self, served: _ServedModel, job: PrefillJob) -> None:
        served.prefill.add(job)
        self._device.wake()

    def _add_decode(self, served: _ServedModel, job: DecodeJob) -> None:
        served.decode.add(job)
        self._device.wake()

    def _num_free_slots(self, sequence: _DecodingSequence) -> int:
        request, served = sequence.request, self._served[sequence.request.model]
        num_tokens = request.num_prompt + request.num_sent + served.decode.num_tokens(sequence.job)
        return sequence.num_blocks * served.config.block_size - num_tokens

    def _check(self, sequence: _DecodingSequence) -> None:
        """Grows the lease of a sequence, or pre-empts it if the unit recalls its blocks or the pool is full."""
        served, growth = self._served[sequence.request.model], sequence.growth
        num_free = self._num_free_slots(sequence)
        num_wanted = growth.blocks_to_request(sequence.num_blocks, num_free)
        if sequence.is_preempted:
            self._preempt(sequence)
            return
        if num_wanted:
            while num_wanted:
                blocks = self.unit.grow(sequence.lease.ref, served.decode_name, num_wanted)
                if blocks is not None:
                    sequence.num_blocks += len(blocks)
                    growth.on_granted()
                    break
                num_wanted = growth.smaller_request(num_wanted)
            if not num_wanted and growth.on_pool_full(num_free):
                self._preempt(sequence)
                return
        served.decode.schedule_check(sequence.job)

    def _preempt(self, sequence: _DecodingSequence) -> None:
        """Frees the KV of a sequence and queues its request again. Its tokens are kept, their KV is computed again."""
        request, served = sequence.request, self._served[sequence.request.model]
        request.num_sent += served.decode.num_tokens(sequence.job)
        served.decode.remove(sequence.job)
        del self._decoding[sequence.lease.ref.lease_id]
        self.unit.release(sequence.lease.ref, served.decode_name, request.hashes)
        self.num_requeued += 1
        self.num_running[request.model] -= 1
        self._device.wake()
        self.enqueue(request)

    def _on_decoded(self, sequence: _DecodingSequence) -> None:
        request = sequence.request
        request.num_sent = request.num_output
        del self._decoding[sequence.lease.ref.lease_id]
        self._finish(request, sequence.lease, self._served[request.model].decode_name)

    def _finish(self, request: SimulatedRequest, lease: Lease, owner: str) -> None:
        """The client has the last token. The slot is free ``end_s`` later."""
        record = request.record
        record.status, record.num_output, record.num_input = OK, request.num_output, request.num_prompt
        record.finish = "LENGTH" if request.num_output >= request.max_new_tokens else "EOS"
        if request.num_output > 1:
            record.pieces.append((self._timeline.now_s, request.num_output - 1))
        self.num_running[request.model] -= 1
        self._end(request)
        self._timeline.after(self._delays.end_s, lambda: self._release(request, lease, owner))

    def _release(self, request: SimulatedRequest, lease: Lease, owner: str) -> None:
        self.unit.release(lease.ref, owner, request.hashes)
        self._schedule()

    def _end(self, request: SimulatedRequest) -> None:
        request.record.ended_s = self._timeline.now_s
        request.on_end(request)
