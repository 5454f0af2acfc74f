"""Links to the units of the mesh, and the choice of the unit for the next attempt of a request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from muxmesh.block_hashes import KvIdentity, kv_demand
from muxmesh.config.model_config import ModelConfig, reserved_output_tokens
from muxmesh.errors import ModelNotFound
from muxmesh.internal.v1 import kvstore_pb2_grpc
from muxmesh.quoting import quoted
from muxmesh.slo import RequestSlo
from muxmesh.types import EngineRequest, KvDemand
from muxmesh.unloaded_latency import unloaded
from router.admission_client import UnitAdmission
from router.expected_work import ExpectedWork
from router.unit_choice import unit_load


@dataclass(frozen=True, slots=True)
class PlacedModel:
    """The configuration of a model on one unit, and the identity of its KV there.

    The unit tells the fingerprint of the weights, which the router need not have.
    """

    config: ModelConfig
    identity: KvIdentity


@dataclass(frozen=True, slots=True)
class UnitLink:
    """The connections to one unit, and the models that it serves."""

    name: str
    admission: UnitAdmission
    kvstore: kvstore_pb2_grpc.KvStoreServiceAsyncStub
    commands: kvstore_pb2_grpc.UnitModelServiceAsyncStub
    models: dict[str, PlacedModel]
    expected_work: ExpectedWork
    num_assigned: Counter[str] = field(default_factory=Counter)
    """Sequences of this router that wait for a credit of the unit or have one, by model."""

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

    def kv_demand(self, request: EngineRequest) -> KvDemand:
        """What ``request`` needs of this unit's KV pool. Its model has to be served here."""
        placed, weights = self.models[request.model], self.admission.fingerprints.get(request.model)
        identity = None if weights is None else replace(placed.identity, weights=weights)
        num_sent = len(request.resume_token_ids)
        reserved = reserved_output_tokens(placed.config, request.prediction, num_sent)
        return kv_demand(request, identity, placed.config.block_size, reserved)


class Units:
    """Owns the links to all units."""

    def __init__(self, links: Iterable[UnitLink]) -> None:
        self._links: Mapping[str, UnitLink] = {link.name: link for link in links}

    def __iter__(self) -> Iterator[UnitLink]:
        return iter(self._links.values())

    def choose(self, model: str) -> UnitLink:
        """Returns the unit with the least load of ``model`` (`router.unit_choice`).

        Raises ModelNotFound if no unit serves the model.
        """
        serving = [link for link in self._links.values() if model in link.models]
        if not serving:
            served = ", ".join(sorted({name for link in self for name in link.models}))
            raise ModelNotFound(f"model: {quoted(model)} is not served by any unit; served: {served}")
        return min(
            serving,
            key=lambda link: unit_load(
                is_connected=link.admission.connected.is_set(), num_assigned=link.num_assigned[model]
            ),
        )

    def oldest_queued_s(self, model: str, unix_s: float) -> float:
        """Seconds since the arrival of the oldest request for ``model`` that waits for a credit; 0 without one."""
        arrivals = (link.admission.oldest_arrival_s(model) for link in self._links.values())
        return max((unix_s - arrived_at_s for arrived_at_s in arrivals if arrived_at_s is not None), default=0.0)

    def num_queued(self, model: str) -> int:
        """Requests for ``model`` that wait for a credit, over all units."""
        return sum(link.admission.num_queued(model) for link in self._links.values())
