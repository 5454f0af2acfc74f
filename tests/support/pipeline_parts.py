"""A router's pipeline over real parts, except for its I/O: attempts are scripted and credits are issued at once."""

from __future__ import annotations

import asyncio
import random
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, cast

from muxmesh.block_hashes import KvIdentity
from muxmesh.clock import ManualClock
from muxmesh.config.model_config import ModelConfig
from muxmesh.config.schema import RouterConfig
from muxmesh.config.slo_config import SloConfig
from muxmesh.engine.api import Finished, Tokens
from muxmesh.errors import MeshError
from muxmesh.internal.v1 import kvstore_pb2_grpc
from muxmesh.models.model_spec import SIM_SPEC
from muxmesh.models.sampling_defaults import NO_DEFAULTS, SamplingDefaults
from muxmesh.models.tokenizer import TextModel, load_text_model
from muxmesh.predictor.checked_predictor import CheckedPredictor
from muxmesh.predictor.length_predictor import LengthPredictor
from muxmesh.scheduling_policy import FCFS, SchedulingPolicy
from muxmesh.step_cost import ModelCosts
from muxmesh.types import EngineRequest, Finish, FinishReason, KvDemand, LeaseRef, SchedulingState
from muxmesh.unloaded_latency import UnloadedCosts
from router.admission_client import Credit, ReportedLoad
from router.attempt import AttemptEvent, Prefilled, Reported
from router.credit_wait import CreditWait
from router.expected_work import ExpectedWork
from router.length_forecast import LengthForecaster
from router.pipeline import GenerationPipeline
from router.prompt_tokenizer import PromptTokenizer
from router.queue_limit import QueueLimit
from router.quotas import NO_QUOTAS, Quotas
from router.request_metrics import RequestMetrics
from router.sequence_driver import SequenceDriver
from router.served_models import ModelLimits, ServedModel, ServedModels
from router.unit_link import PlacedModel, UnitLink
from router.units import Units


async def until(condition: Callable[[], bool]) -> None:
    """Lets other tasks run until ``condition()`` is true."""
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0)


TEXT = load_text_model(None)
"""One token for each byte; its chat template writes `role: content` lines."""
EOS = 0
IDENTITY = KvIdentity("weights", "float32", "float32", "layout", "rope")


def tokens_of(text: str) -> tuple[int, ...]:
    return tuple(TEXT.encode(text, False))


def served_model(
    name: str = "m",
    engine: str = "native",
    max_model_len: int = 100,
    capacity_tokens: int = 10_000,
    default_max_new_tokens: int = 20,
    text: TextModel = TEXT,
    defaults: SamplingDefaults = NO_DEFAULTS,
    slo: SloConfig | None = None,
) -> ServedModel:
    """A model with the byte tokenizer: 259 tokens, of which 0 ends the output."""
    config = ModelConfig(name=name, engine=cast(Any, engine), default_max_new_tokens=default_max_new_tokens, slo=slo)
    limits = ModelLimits(max_model_len, capacity_tokens, default_max_new_tokens, SIM_SPEC.eos_token_ids)
    return ServedModel(name, ("u",), config, SIM_SPEC, text, limits, defaults)


class FakeAdmission:
    """A unit's admission that issues each credit at once, or once ``open`` is set. Half of each prompt is cached."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.open.set()
        self.connected = asyncio.Event()
        self.connected.set()
        self.costs: dict[str, ModelCosts] = {}
        self.unloaded: defaultdict[str, UnloadedCosts] = defaultdict(UnloadedCosts)
        self.fingerprints: dict[str, str] = {}
        self.loads: dict[str, ReportedLoad] = {}
        self.num_issued = 0
        self.num_unreturned = 0
        self._queued: Counter[str] = Counter()
        self._arrivals: list[float] = []

    def num_queued(self, model: str) -> int:
        return self._queued[model]

    def num_before(self, model: str, tenant: str, scheduling: SchedulingState, weight: float = 1.0) -> int:
        return self._queued[model]

    def oldest_arrival_s(self, model: str) -> float | None:
        return min(self._arrivals, default=None)

    async def wait_for_credit(
        self,
        model: str,
        tenant: str,
        scheduling: SchedulingState,
        demand: KvDemand,
        tenant_weight: float = 1.0,
        leaves_when_lost: bool = False,
    ) -> Credit:
        self._queued[model] += 1
        self._arrivals.append(scheduling.arrived_at_s)
        try:
            await self.open.wait()
        finally:
            self._queued[model] -= 1
            self._arrivals.remove(scheduling.arrived_at_s)
        self.num_issued += 1
        self.num_unreturned += 1
        return Credit(
            LeaseRef(self.num_issued, 1), "p", "", "d", "", self.num_issued, 3, scheduling.with_cached_fraction(0.5)
        )

    def return_credit(self, credit: Credit) -> None:
        self.num_unreturned -= 1


Step = AttemptEvent | MeshError | asyncio.Event | Callable[[], None]
"""Of a script: an event to yield, an error to raise, an event to wait for, or a function to call."""
Script = Callable[[EngineRequest], Iterable[Step]]


class ScriptedAttempts:
    """Stands for `router.attempt.run_attempt`: ``script`` decides what an attempt yields. Records the requests."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self.requests: list[EngineRequest] = []
        self.num_running = 0

    async def __call__(self, request: EngineRequest, credit: Credit) -> AsyncGenerator[AttemptEvent, None]:
        self.requests.append(request)
        self.num_running += 1
        try:
            for step in self._script(request):
                if isinstance(step, MeshError):
                    raise step
                if isinstance(step, asyncio.Event):
                    await step.wait()
                elif isinstance(step, Prefilled | Tokens | Reported | Finished):
                    yield step
                else:
                    step()
        finally:
            self.num_running -= 1


def writes(text: str, finish: Finish | None = None, prefilled: Prefilled | None = None) -> Script:
    """A script: prefill, one token for each byte of ``text`` that is not resumed, and the finish, LENGTH by default."""

    def script(request: EngineRequest) -> Iterable[Step]:
        yield prefilled or Prefilled(0)
        start = len(request.resume_token_ids)
        for index, token_id in enumerate(tokens_of(text)[start:], start):
            yield Tokens(index, (token_id,))
        yield Finished(finish or Finish(FinishReason.LENGTH))

    return script


@dataclass
class PipelineParts:
    """A pipeline and the parts that a test looks into."""

    pipeline: GenerationPipeline
    models: ServedModels
    units: Units
    admission: FakeAdmission
    attempts: ScriptedAttempts
    forecaster: LengthForecaster
    clock: ManualClock
    metrics: RequestMetrics


@asynccontextmanager
async def pipeline_parts(
    script: Script,
    *models: ServedModel,
    config: RouterConfig | None = None,
    predictor: LengthPredictor | None = None,
    clock: ManualClock | None = None,
    kvstore: kvstore_pb2_grpc.KvStoreServiceAsyncStub | None = None,
    policy: SchedulingPolicy = FCFS,
    quotas: Quotas = NO_QUOTAS,
) -> AsyncIterator[PipelineParts]:
    """A pipeline over one unit, on a clock that stands at 100 s. Retries do not wait."""
    config = config or RouterConfig(max_restarts=2, predictor_budget_s=60)
    served = ServedModels()
    for model in models or (served_model(),):
        served.add(model)
    clock, admission, attempts = clock or ManualClock(100.0), FakeAdmission(), ScriptedAttempts(script)
    placed = {model.name: PlacedModel(model.config, IDENTITY) for model in served}
    work = ExpectedWork(policy.longest_lead)
    units = Units([UnitLink("u", cast(Any, admission), cast(Any, kvstore), cast(Any, None), placed, work)])

    async def no_wait(seconds: float) -> None:
        await asyncio.sleep(0)

    driver = SequenceDriver(CreditWait(units, clock).credited, attempts, clock, config.max_restarts, no_wait)
    checked = CheckedPredictor(predictor or LengthPredictor())
    forecaster = LengthForecaster(checked, config.predictor_budget_s, clock, bytes(32))
    metrics = RequestMetrics({model.name: model.limits.max_model_len for model in served})
    with ThreadPoolExecutor(1) as short, ThreadPoolExecutor(2) as long:
        tokenizer = PromptTokenizer(short, long, config.max_waiting_prompt_bytes)
        queue_limit = QueueLimit(config.max_waiting_requests, bytes(32), limits_tenants=True)
        pipeline = GenerationPipeline(
            served,
            units,
            driver,
            forecaster,
            policy,
            config,
            clock,
            random.Random(7),
            tokenizer,
            metrics,
            queue_limit,
            quotas,
        )
        try:
            yield PipelineParts(pipeline, served, units, admission, attempts, forecaster, clock, metrics)
        finally:
            forecaster.close()
