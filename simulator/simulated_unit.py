"""One unit in virtual time: the mesh's own unit state, router queue and block growth, around simulated workers.

Takes the steps of a request from the queue to the release of its lease; `simulated_decoding` has those from hand-off to
last token. It knows no network: `Delays` stand for the messages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from kvstore.arbiter import Arbiter
from kvstore.leases import LeaseRecord, StandingChange
from kvstore.memory_reclaim import MemoryLack
from kvstore.model_states import NO_LIMITS, AwakeLimits, WorkerCommand
from kvstore.preemption_costs import CALLS_S, KvCosts, WayCosts
from kvstore.unit import IssuedCredit, Unit
from kvstore.unit_model import UnitModel
from kvstore.worker_slots import EngineState
from loadtest.record import OK
from muxmesh.block_hashes import demand_for
from muxmesh.config.model_config import ModelConfig, reserved_output_tokens
from muxmesh.config.schema import UnitConfig
from muxmesh.errors import InvalidRequest
from muxmesh.fairness import Fairness
from muxmesh.kv_cost import CopyRates
from muxmesh.models.model_spec import KvShape, ModelSpec
from muxmesh.scheduling_policy import SchedulingPolicy
from muxmesh.slo import RequestSlo, first_token_due_s
from muxmesh.step_cost import UNMEASURED, ModelCosts
from muxmesh.types import Lease, QueuedRequest, Role, SloTargets
from router.assigned_work import AssignedWork
from router.expected_work import ExpectedWork, ModelService
from router.request_queue import RequestQueue
from router.unit_choice import Candidate, UnitLoad, prefill_s
from simulator.simulated_decoding import ServedModel, SimulatedDecoding
from simulator.simulated_device import Device
from simulator.simulated_request import SimulatedRequest
from simulator.simulated_workers import DecodeWorker, PrefillJob, PrefillWorker, Worker
from simulator.step_times import LinearStepTimes, Slowdown, StepTimes, no_slowdown, unloaded_latency
from simulator.swap_copies import SwapCopies
from simulator.timeline import NO_DELAYS, Delays, Timeline
from simulator.unit_use import ModelSwitches, UnitUse, WorkerUse

_ROUTER = "router"


@dataclass(frozen=True, slots=True)
class Decision:
    """An admission: the ``number``-th credit, the request that it was issued to, and the reason of its position."""

    at_s: float
    number: int
    index: int
    model: str
    num_overtaken: int
    reason: str


@dataclass(frozen=True, slots=True)
class KvChoice:
    """What became of a paused sequence's KV: costs as expected, and with the true lengths of outputs.

    ``for_arrival_s``: arrival of the one that needed its memory. The costs have the same speeds of copies and prefill.
    """

    lease_id: int
    for_arrival_s: float
    expected: WayCosts
    true: WayCosts


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
        slowdown: Slowdown = no_slowdown,
        times: Mapping[str, StepTimes] | None = None,
        on_kv_choice: Callable[[KvChoice], None] | None = None,
        fairness: Fairness | None = None,
    ) -> None:
        """``times``: model → step times; a model without an entry has those of the sim engine.

        ``on_kv_choice`` is called with each choice of what becomes of a paused sequence's KV. ``fairness``: between
        tenants; None: they are not told apart.
        """
        models = {model.name: UnitModel.of(config, model, specs[model.name]) for model in config.models}
        awake = AwakeLimits(config.max_awake_models, config.idle_sleep_s)
        pool_bytes = config.kv_pool * config.tensor_parallel
        self.unit = Unit(
            pool_bytes,
            config.total_slab,
            models,
            swap_bytes=config.kv_swap,
            policy=policy,
            awake=awake,
            preemption_mode=config.preemption_mode,
            fairness=fairness,
        )
        self.unit.reclaim.costs_of = self._kv_costs
        self._on_kv_choice = on_kv_choice
        if on_kv_choice is not None:
            self.unit.reclaim.on_choice = self._kv_chosen
        self._limits = awake
        self._never_awake: set[str] = set()
        """Workers that have not been awake yet."""
        self.expected_work = ExpectedWork(policy.longest_lead)
        self._timeline = timeline
        self._policy = policy
        self._on_decision = on_decision
        self._queue = RequestQueue(policy)
        self._waiting: dict[int, SimulatedRequest] = {}
        self._prefills: dict[int, PrefillJob] = {}
        """Prompts that a prefill worker has, by the id of their lease."""
        self._served = {
            model.name: self._attach(config, model, models[model.name].shape, (times or {}).get(model.name), delays)
            for model in config.models
        }
        workers: list[Worker] = []
        for served in self._served.values():  # slots in the order in which the supervisor starts workers
            workers += [served.prefill, served.decode]
        self._delays = delays
        self._device = Device(timeline, workers, Arbiter(config.resolved_arbiter(_uses_mps(config))), delays, slowdown)
        decode_workers = [served.decode for served in self._served.values()]
        self._decoding = SimulatedDecoding(
            timeline, self.unit, self._device, decode_workers, self._schedule, self._finish, self._requeue
        )
        self._num_tokens: Counter[str] = Counter()
        """Tenant → output tokens of its requests that have ended."""
        self._name = config.name
        self._assigned = AssignedWork()
        self._last_entry_id = 0
        self._timer_s: float | None = None

    @property
    def num_waiting(self) -> int:
        """Requests without a credit."""
        return len(self._queue)

    def num_queued(self, model: str) -> int:
        """Requests of one model without a credit."""
        return self._queue.count(model)

    def count_tokens(self) -> Counter[str]:
        """Tenant → output tokens so far. Requests whose KV was freed count again once it is computed again."""
        return self._num_tokens + self._decoding.count_tokens()

    @property
    def use(self) -> UnitUse:
        """What the unit has done so far."""
        device, models = self._device.use, self._served.values()
        workers = [worker for served in models for worker in (served.prefill, served.decode)]
        states = self.unit.states.models if self._limits != NO_LIMITS else {}
        return UnitUse(
            device.busy_s,
            device.share_s,
            device.peak_share,
            tuple(
                WorkerUse(worker.model, worker.role, worker.share, granted_s, num_grants)
                for worker, granted_s, num_grants in zip(workers, device.granted_s, device.num_grants, strict=True)
            ),
            sum(served.decode.num_displaced for served in models),
            self._decoding.num_requeued,
            self._decoding.num_swapped,
            sum(served.swap.copied_bytes for served in models),
            {name: ModelSwitches(record.num_wakes, record.waking_s) for name, record in states.items()},
        )

    def candidate(
        self, model: str, num_tokens: int, num_cached: int, decode_tokens: float, costs: ModelCosts
    ) -> Candidate:
        """What a router knows of the unit for a request of ``num_tokens``; see `router.units`."""
        config, assigned = self._served[model].config, self._assigned
        decode_s = assigned.mean_decode_s(model)
        if decode_s is None:
            decode_s = costs.decode.decode_s(decode_tokens, num_tokens)
        load = UnitLoad(assigned.num(model), decode_s, assigned.prefill_s)
        return Candidate(
            self._name,
            num_tokens,
            num_cached,
            load.wait_s(config.max_num_seqs),
            prefill_s(costs, num_tokens, num_cached, config.step_token_budget),
            load.num_sequences,
            is_awake=self.unit.states.admits(model),
        )

    def assign(self, request: SimulatedRequest, num_cached: int) -> None:
        """Counts the work of a request that is about to be queued, of which ``num_cached`` tokens need no prefill."""
        served, num_tokens = self._served[request.model], request.num_prompt + request.num_sent
        costs, chunk = served.costs or UNMEASURED, served.config.step_token_budget
        decode_s = costs.decode.decode_s(max(0.0, request.prediction.p50_tokens - 1), num_tokens)
        request.assigned = self._assigned.add(request.model, prefill_s(costs, num_tokens, num_cached, chunk), decode_s)

    def service(self, model: str) -> ModelService:
        """The router's view of a model on this unit, with the step costs that the workers reported last."""
        served = self._served[model]
        return ModelService(model, served.costs, served.config.step_token_budget, served.config.max_num_seqs)

    def _kv_costs(self, model: str) -> KvCosts:
        """What moving and computing the KV of a model costs, as its workers have measured."""
        served = self._served[model]
        rate = self._delays.swap_bytes_per_s
        costs = KvCosts(CopyRates(rate, rate, CALLS_S), prefill_chunk=served.config.step_token_budget)
        return replace(costs, prefill=served.prefill.fit.cost) if served.prefill.fit.cost else costs

    def _kv_chosen(self, victim: LeaseRecord, lack: MemoryLack, expected: WayCosts) -> None:
        assert self._on_kv_choice is not None
        reclaim, num_bytes = self.unit.reclaim, self.unit.reclaim.kv_bytes(victim)
        with self._decoding.true_work():
            true = reclaim.way_costs(victim, num_bytes, lack, self._timeline.now_s)
        self._on_kv_choice(KvChoice(victim.lease.ref.lease_id, lack.scheduling.arrived_at_s, expected, true))

    def slo_targets(self, model: str, num_prompt: int) -> SloTargets | None:
        """The targets of a request with ``num_prompt`` prompt tokens; None for a model without an SLO."""
        slo = self._served[model].slo
        return None if slo is None else slo.targets(num_prompt)

    def enqueue(self, request: SimulatedRequest) -> None:
        """Queues a request for a credit. A request that the unit can never serve ends at once, with an error."""
        self._last_entry_id += 1
        request.entry_id = self._last_entry_id
        self._waiting[request.entry_id] = request
        num_known, config = request.num_prompt + request.num_sent, self._served[request.model].config
        demand = demand_for(
            num_known,
            request.max_tokens,
            reserved_output_tokens(config, request.prediction, request.num_sent),
            request.hashes,
            use_cache=bool(request.hashes),
        )
        tenant, weight = request.tenant, request.tenant_weight
        self._queue.add(QueuedRequest(request.entry_id, request.model, request.scheduling, demand, tenant, weight))
        self._show_next()
        self._schedule()

    def _attach(
        self, unit: UnitConfig, model: ModelConfig, shape: KvShape, given: StepTimes | None, delays: Delays
    ) -> ServedModel:
        """Attaches the workers of a model, which are ready at once."""
        names = []
        for role in Role:
            worker = self.unit.attach(role, model.name, "", 0)
            worker.ready = True
            if worker.told is not EngineState.AWAKE:
                self._never_awake.add(worker.name)
            names.append(worker.name)
        times = given or LinearStepTimes.of(model.sim)
        prefill_share, decode_share = (unit.arbiter_share(model, role, _uses_mps(unit)) for role in Role)
        return ServedModel(
            model,
            PrefillWorker(times, self._policy, model.step_token_budget, model.max_num_seqs, model.name, prefill_share),
            DecodeWorker(times, model.name, decode_share, self._policy, model.max_num_seqs),
            names[0],
            names[1],
            shape,
            RequestSlo.of(model.slo, unloaded_latency(times, model.step_token_budget)),
            SwapCopies(self._timeline, delays.swap_bytes_per_s),
        )

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
        if self.unit.admission.waiting or self.unit.reclaim.has_growth_lacks:
            self.unit.report(self._decoding.progress())
        decisions = self.unit.schedule(now_s, now_s)
        for credit in decisions.credits:
            self._admit(credit)
        for preemption in decisions.preemptions:
            self._decoding.preempt(preemption.lease_id)
        for command in decisions.commands:
            self._tell(command)
        for swap_in in decisions.swap_ins:
            self._decoding.swap_in(swap_in)
        for change in decisions.standings:
            self._set_standing(change)
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

    def _set_standing(self, change: StandingChange) -> None:
        """A worker orders some of its sequences by another standing of their tenant."""
        for lease_id in change.lease_ids:
            if (job := self._prefills.get(lease_id)) is not None:
                job.scheduling = job.scheduling.with_standing(change.standing)
        self._decoding.set_standing(change)

    def _tell(self, command: WorkerCommand) -> None:
        """A worker does as it is told after a delay, and the unit is scheduled again."""
        worker = self.unit.workers[command.worker]

        def report() -> None:
            worker.report(command.number)
            self._schedule()

        delays = self._delays
        if command.engine is not EngineState.AWAKE:
            delay_s = delays.sleep_s
        elif worker.name in self._never_awake:
            self._never_awake.discard(worker.name)
            delay_s = delays.load_s
        else:
            delay_s = delays.wake_s
        self._timeline.at(self._timeline.now_s + delay_s, report)

    def _admit(self, credit: IssuedCredit) -> None:
        request = self._waiting.pop(credit.entry_id)
        self._queue.remove(credit.entry_id)
        served, now_s = self._served[request.model], self._timeline.now_s
        if self._on_decision is not None:
            reason = self._policy.reason(credit.scheduling, now_s)
            self._on_decision(
                Decision(now_s, credit.decision, request.index, request.model, credit.num_overtaken, reason)
            )
        lease = self.unit.acquire(credit.lease.ref, served.prefill_name)
        num_uncomputed = request.num_prompt + request.num_sent - lease.num_computed_tokens
        if request.num_sent == 0:
            request.record.num_cached = lease.num_computed_tokens
        job = PrefillJob(
            credit.scheduling,
            lease.num_computed_tokens,
            num_uncomputed,
            lambda: self._on_prefilled(request, lease),
            first_token_due_s(request.slo_at(now_s), now_s),
        )
        self._prefills[lease.ref.lease_id] = job
        self._timeline.after(self._delays.admit_s, lambda: self._add_prefill(served, job))

    def _on_prefilled(self, request: SimulatedRequest, lease: Lease) -> None:
        """The known tokens are computed and one more is sampled: finishes, or hands off to the decode worker."""
        served = self._served[request.model]
        del self._prefills[lease.ref.lease_id]
        if request.assigned is not None:
            self._assigned.prefilled(request.assigned)
        if request.num_sent == 0:
            request.record.pieces.append((self._timeline.now_s, 1))
            request.on_first_token()
        request.num_sent += 1
        if request.num_sent >= request.num_output:
            self._finish(request, lease, served.prefill_name, request.hashes)
            return
        num_known = request.num_prompt + request.num_sent
        lease = self.unit.move(lease.ref, served.prefill_name, served.decode_name, num_known - 1, (0,))
        self._decoding.hand_off(request, served, lease, self._delays.hand_off_s)
        if self.unit.admission.waiting:
            self._schedule()

    def _add_prefill(self, served: ServedModel, job: PrefillJob) -> None:
        served.prefill.add(job)
        self._device.wake(served.prefill)

    def _requeue(self, request: SimulatedRequest) -> None:
        """The KV of a pre-empted request was freed: it needs a credit again."""
        self._unassign(request)
        self.assign(request, 0)
        self.enqueue(request)

    def _finish(
        self, request: SimulatedRequest, lease: Lease, owner: str, hashes: tuple[bytes, ...], served_s: float = 0.0
    ) -> None:
        """The client has the last token. The slot is free ``end_s`` later."""
        self._num_tokens[request.tenant] += request.num_output
        record = request.record
        record.status, record.num_output, record.num_input = OK, request.num_output, request.num_prompt
        record.finish = "LENGTH" if request.num_output >= request.max_new_tokens else "EOS"
        if request.num_output > 1:
            record.pieces.append((self._timeline.now_s, request.num_output - 1))
        self._end(request)
        self._timeline.after(self._delays.end_s, lambda: self._release(lease, owner, hashes, served_s))

    def _release(self, lease: Lease, owner: str, hashes: tuple[bytes, ...], served_s: float) -> None:
        self.unit.release(lease.ref, owner, hashes, served_s)
        self._schedule()

    def _unassign(self, request: SimulatedRequest) -> None:
        if request.assigned is not None:
            self._assigned.remove(request.assigned)
            request.assigned = None

    def _end(self, request: SimulatedRequest) -> None:
        self._unassign(request)
        request.record.ended_s = self._timeline.now_s
        request.on_end(request)


def _uses_mps(unit: UnitConfig) -> bool:
    """Whether the workers of a unit would share a GPU by MPS or green contexts, on a machine that has them."""
    return unit.is_cuda and (unit.mps != "off" or unit.limits_by_green_contexts)
