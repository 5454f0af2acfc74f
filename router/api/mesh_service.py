"""The Mesh service: reports the served models and the state of the mesh. Changes nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import grpc

from muxmesh import __version__
from muxmesh.clock import Clock
from muxmesh.errors import PermissionDenied
from muxmesh.internal.v1 import kvstore_pb2
from muxmesh.process_registry import ProcessRegistry
from muxmesh.rpc.status_codes import from_rpc_error
from muxmesh.scheduling_policy import SchedulingPolicy
from muxmesh.v1 import mesh_pb2, mesh_pb2_grpc
from router.api.unknown_fields import refuse_unknown_fields
from router.caller import caller
from router.length_forecast import LengthForecaster
from router.peer_routers import with_peers
from router.pipeline import GenerationPipeline
from router.request_metrics import RequestMetrics
from router.served_models import ServedModel, ServedModels
from router.slo_counts import WINDOW_S, SloTally
from router.unit_link import UnitLink
from router.units import Units

Context = grpc.aio.ServicerContext[Any, Any]
PeerCounts = Callable[[], Awaitable[Iterable[mesh_pb2.RouterModelStatus]]]
_STATUS_TIMEOUT_S = 2.0


async def _no_peers() -> Iterable[mesh_pb2.RouterModelStatus]:
    return ()


class MeshService(mesh_pb2_grpc.MeshServicer):
    """ListModels, GetModelInfo, GetStatus."""

    def __init__(
        self,
        models: ServedModels,
        units: Units,
        pipeline: GenerationPipeline,
        forecaster: LengthForecaster,
        registry: ProcessRegistry,
        policy: SchedulingPolicy,
        metrics: RequestMetrics,
        clock: Clock,
        peer_counts: PeerCounts = _no_peers,
        tenant_name: Callable[[str], str] = str,
    ) -> None:
        """``peer_counts``: the counts of the other routers, which `GetStatus` adds to those of this one.
        ``tenant_name``: the name of a tenant by its id.
        """
        self._models = models
        self._units = units
        self._pipeline = pipeline
        self._forecaster = forecaster
        self._registry = registry
        self._policy = policy
        self._metrics = metrics
        self._clock = clock
        self._peer_counts = peer_counts
        self._tenant_name = tenant_name

    def own_counts(self) -> list[mesh_pb2.RouterModelStatus]:
        """The counts of this router, by model."""
        return [self._router_status(model) for model in self._models]

    async def ListModels(self, request: mesh_pb2.ListModelsRequest, context: Context) -> mesh_pb2.ListModelsResponse:
        """See the proto."""
        refuse_unknown_fields(request)
        return mesh_pb2.ListModelsResponse(models=[_model_info(model) for model in self._models])

    async def GetModelInfo(
        self, request: mesh_pb2.GetModelInfoRequest, context: Context
    ) -> mesh_pb2.GetModelInfoResponse:
        """See the proto."""
        refuse_unknown_fields(request)
        return mesh_pb2.GetModelInfoResponse(model=_model_info(self._models.find(request.model)))

    async def GetStatus(self, request: mesh_pb2.GetStatusRequest, context: Context) -> mesh_pb2.GetStatusResponse:
        """See the proto. A unit whose kvstore does not respond is reported as not connected.

        Raises PermissionDenied for a tenant that is no operator: the state shows what others do.
        """
        if not caller().is_operator:
            raise PermissionDenied(
                "the state of the mesh is for operators; `muxmesh tenant set NAME --operator` makes a tenant one"
            )
        refuse_unknown_fields(request)
        processes = await self._registry.processes()
        return mesh_pb2.GetStatusResponse(
            version=__version__,
            models=with_peers(self.own_counts(), await self._peer_counts()),
            units=[await self._unit_status(link) for link in self._units],
            processes=[
                mesh_pb2.ProcessStatus(
                    name=record.name,
                    pid=record.pid,
                    address=record.address,
                    started_at_unix_s=record.started_at_unix_s,
                    num_restarts=num_restarts,
                )
                for record, num_restarts in processes or ()
            ],
            redis_connected=processes is not None,
            order_policy=self._policy.name,
        )

    async def _unit_status(self, link: UnitLink) -> mesh_pb2.UnitStatus:
        request = kvstore_pb2.GetUnitStatusRequest()
        try:
            status = (await link.kvstore.GetUnitStatus(request, timeout=_STATUS_TIMEOUT_S)).unit
        except grpc.aio.AioRpcError as error:
            if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise from_rpc_error(error) from error  # a failed integrity check must not be hidden
            return mesh_pb2.UnitStatus(unit=link.name, connected=False)
        for one in status.tenants:
            one.tenant = self._tenant_name(one.tenant)
        return status

    def _router_status(self, model: ServedModel) -> mesh_pb2.RouterModelStatus:
        counters = self._pipeline.counters[model.name]
        num_waiting = self._pipeline.num_waiting(model.name)
        return mesh_pb2.RouterModelStatus(
            model=model.name,
            num_requests_waiting=num_waiting,
            num_requests_running=counters.num_running - num_waiting,
            num_requests_finished=counters.num_finished,
            num_requests_aborted=counters.num_aborted,
            num_restarts=counters.num_restarts,
            prompt_tokens=counters.prompt_tokens,
            output_tokens=counters.output_tokens,
            prediction_tau=self._forecaster.tau(model.name),
            predictions_used=self._forecaster.is_ranking(model.name),
            slo=None if model.config.slo is None else self._slo_status(model.name),
        )

    def _slo_status(self, model: str) -> mesh_pb2.SloStatus:
        counts = self._metrics.of(model).slo
        recent = counts.recent(self._clock.monotonic_s())
        return mesh_pb2.SloStatus(total=_slo_tally(counts.total), recent=_slo_tally(recent), window_s=WINDOW_S)


def _slo_tally(tally: SloTally) -> mesh_pb2.SloTally:
    return mesh_pb2.SloTally(**dataclasses.asdict(tally))


def _model_info(model: ServedModel) -> mesh_pb2.ModelInfo:
    config, spec = model.config, model.spec
    return mesh_pb2.ModelInfo(
        name=model.name,
        architecture=spec.architecture,
        engine=config.engine,
        unit=",".join(model.units),
        max_model_len=model.limits.max_model_len,
        default_max_new_tokens=model.limits.default_max_new_tokens,
        vocab_size=spec.vocab_size,
        eos_token_ids=sorted(spec.eos_token_ids),
        has_chat_template=model.text.has_chat_template,
        kv_bytes_per_token=spec.kv_shape(config.block_size, config.kv_dtype).kv_bytes_per_token,
        dtype=config.dtype,
        sampling_defaults=mesh_pb2.SamplingDefaults(**model.sampling_defaults.sampling()),
        slo=None if config.slo is None else mesh_pb2.Slo(**config.slo.model_dump()),
    )
