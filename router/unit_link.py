"""The link to one unit: its connections, the models that it serves, and what this router has assigned to it.

It does not compare units (`router.units`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from muxmesh.block_hashes import KvIdentity, kv_demand
from muxmesh.config.model_config import ModelConfig, reserved_output_tokens
from muxmesh.internal.v1 import kvstore_pb2_grpc
from muxmesh.slo import RequestSlo
from muxmesh.types import EngineRequest, KvDemand
from muxmesh.unloaded_latency import unloaded
from router.admission_client import UnitAdmission
from router.assigned_work import AssignedWork
from router.expected_work import ExpectedWork

_UNLIMITED = 1 << 62
ChainRoot = tuple[int, bytes]
"""What the hashes of a request depend on beside its tokens: block size and root."""
Chains = dict[ChainRoot | None, tuple[bytes, ...] | None]
"""The hashes of a request's known tokens by root; of no root, none."""


@dataclass(frozen=True, slots=True)
class PlacedModel:
    """The configuration of a model on one unit, and the identity of its KV there.

    The unit tells the fingerprint of the weights, which the router need not have. ``capacity_tokens``: what the unit's
    pool holds.
    """

    config: ModelConfig
    identity: KvIdentity
    capacity_tokens: int = _UNLIMITED


@dataclass(frozen=True, slots=True)
class UnitLink:
    """The connections to one unit, and the models that it serves."""

    name: str
    admission: UnitAdmission
    kvstore: kvstore_pb2_grpc.KvStoreServiceAsyncStub
    commands: kvstore_pb2_grpc.UnitModelServiceAsyncStub
    models: dict[str, PlacedModel]
    expected_work: ExpectedWork
    assigned: AssignedWork = field(default_factory=AssignedWork)

    @property
    def is_connected(self) -> bool:
        return self.admission.connected.is_set()

    def add_model(self, model: str, placed: PlacedModel) -> None:
        """Adds a model, without the step costs of an earlier one of its name.

        The unit reports those until the last sequence of that one has ended, after `remove_model`.
        """
        self.admission.costs.pop(model, None)
        self.admission.unloaded.pop(model, None)
        self.models[model] = placed

    def remove_model(self, model: str) -> None:
        """Removes a model. Its running sequences continue."""
        self.models.pop(model, None)

    def request_slo(self, model: str) -> RequestSlo | None:
        """What a request for ``model`` that arrives now is judged by."""
        config = self.models[model].config
        return RequestSlo.of(config.slo, unloaded(config, self.admission.unloaded[model].costs))

    def chain_root(self, request: EngineRequest) -> ChainRoot | None:
        """The block size and the root of the hash chain of ``request`` on this unit; None before the unit has told the
        fingerprint of its weights.
        """
        placed, weights = self.models[request.model], self.admission.fingerprints.get(request.model)
        if weights is None:
            return None
        root = replace(placed.identity, weights=weights).root(request.tenant, request.cache_salt)
        return placed.config.block_size, root

    def kv_demand(self, request: EngineRequest, hashes: tuple[bytes, ...] | None) -> KvDemand:
        """What ``request`` needs of this unit's KV pool. ``hashes``: of its known tokens, with `chain_root`."""
        config, num_sent = self.models[request.model].config, len(request.resume_token_ids)
        return kv_demand(request, hashes, reserved_output_tokens(config, request.prediction, num_sent))
