"""The units of the mesh, and what this router knows of each when it chooses one for a request.

The rule is `router.unit_choice`, the waiting is `router.credit_wait`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from muxmesh.block_hashes import known_hashes
from muxmesh.errors import ModelNotFound
from muxmesh.quoting import quoted
from muxmesh.residency_format import block_keys
from muxmesh.step_cost import ModelCosts
from muxmesh.types import EngineRequest, KvDemand
from router.admission_client import NO_REPORT, ReportedLoad
from router.assigned_work import AssignedSequence
from router.residency import ResidencyIndex
from router.unit_choice import (
    Candidate,
    Choice,
    ChoiceReason,
    UnitLoad,
    assumed_costs,
    choose,
    choose_better,
    prefill_s,
)
from router.unit_link import Chains, UnitLink


@dataclass(frozen=True, slots=True)
class ChosenUnit:
    """The unit for one attempt of a request, the KV that it needs there, and seconds of its prefill and decode."""

    link: UnitLink
    choice: Choice
    demand: KvDemand
    prefill_s: float
    decode_s: float
    chains: Chains
    """Of the units that were looked at: hashing a long prompt takes milliseconds."""

    def with_prediction_of(self, request: EngineRequest) -> ChosenUnit:
        """The same unit for a request with the same tokens and perhaps another prediction."""
        hashes = self.chains.get(self.link.chain_root(request))
        return replace(self, demand=self.link.kv_demand(request, hashes))

    def num_before(self, request: EngineRequest) -> int:
        """Requests of this router that are queued there and precede the request, which is not queued yet."""
        return self.link.admission.num_before(request.model, request.tenant, request.scheduling, request.tenant_weight)

    def assign(self, model: str) -> AssignedSequence:
        """Counts the work as the unit's, from before it is queued there until `AssignedWork.remove`."""
        return self.link.assigned.add(model, self.prefill_s, self.decode_s)


@dataclass(frozen=True, slots=True)
class _View:
    """What one choice looks at: the units that serve the model, each with its candidate and the KV demand."""

    links: Sequence[UnitLink]
    demands: Sequence[KvDemand]
    candidates: Sequence[Candidate]
    decode_s: Sequence[float]
    chains: Chains

    def chosen(self, choice: Choice) -> ChosenUnit:
        index = next(index for index, one in enumerate(self.candidates) if one is choice.candidate)
        prefill = choice.candidate.prefill_s
        return ChosenUnit(self.links[index], choice, self.demands[index], prefill, self.decode_s[index], self.chains)


class Units:
    """Owns the links to all units, and counts choices."""

    def __init__(self, links: Iterable[UnitLink], residency: ResidencyIndex | None = None) -> None:
        """``residency``: what is known of the units' prefix caches; None: nothing."""
        self._links: Mapping[str, UnitLink] = {link.name: link for link in links}
        self.residency = ResidencyIndex() if residency is None else residency
        self._turn = 0
        self.num_choices = Counter[tuple[str, ChoiceReason]]()
        """Attempts by unit and reason of the choice; those of requests that moved count at each unit."""
        self.num_cached_tokens = Counter[tuple[str, ChoiceReason]]()
        """Tokens that these attempts found in the prefix cache."""

    def __iter__(self) -> Iterator[UnitLink]:
        return iter(self._links.values())

    def serving(self, model: str) -> list[UnitLink]:
        """The units that serve a model, at least one. Raises ModelNotFound."""
        serving = [link for link in self._links.values() if model in link.models]
        if not serving:
            served = ", ".join(sorted({name for link in self for name in link.models}))
            raise ModelNotFound(f"model: {quoted(model)} is not served by any unit; served: {served}")
        return serving

    def least_loaded(self, model: str) -> UnitLink:
        """The connected unit with the fewest sequences of ``model``, for what is needed before the prompt is known.

        Raises ModelNotFound if no unit serves the model.
        """
        return min(self.serving(model), key=lambda link: (not link.is_connected, link.assigned.num(model)))

    def choose(self, request: EngineRequest) -> ChosenUnit:
        """The unit for the next attempt of a request. Raises ModelNotFound if no unit serves its model."""
        view = self._view(self.serving(request.model), request, {None: None})
        return self._counted(view.chosen(choose(view.candidates, self._next_turn())))

    def choose_better(self, request: EngineRequest, chosen: ChosenUnit) -> ChosenUnit | None:
        """The unit to which a request that is queued at ``chosen`` moves, see `router.unit_choice`; None: it stays."""
        links, current = [link for link in self._links.values() if request.model in link.models], chosen.link
        if current not in links or not self._has_free_unit(request.model, links, current):
            return None
        view = self._view(links, request, chosen.chains, current)
        here = view.candidates[links.index(current)]
        others = [one for one in view.candidates if one is not here]
        better = choose_better(others, here, self._next_turn())
        return None if better is None else self._counted(view.chosen(better))

    def note_cached(self, chosen: ChosenUnit, num_tokens: int) -> None:
        """An attempt has found ``num_tokens`` tokens in the prefix cache of its unit."""
        self.num_cached_tokens[chosen.link.name, chosen.choice.reason] += num_tokens

    def oldest_queued_s(self, model: str, unix_s: float) -> float:
        """Seconds since the arrival of the oldest request for ``model`` that waits for a credit; 0 without one."""
        arrivals = (link.admission.oldest_arrival_s(model) for link in self._links.values())
        return max((unix_s - arrived_at_s for arrived_at_s in arrivals if arrived_at_s is not None), default=0.0)

    def num_queued(self, model: str) -> int:
        """Requests for ``model`` that wait for a credit, over all units."""
        return sum(link.admission.num_queued(model) for link in self._links.values())

    def _next_turn(self) -> int:
        self._turn += 1
        return self._turn - 1

    def _counted(self, chosen: ChosenUnit) -> ChosenUnit:
        self.num_choices[chosen.link.name, chosen.choice.reason] += 1
        return chosen

    def _has_free_unit(self, model: str, links: Sequence[UnitLink], current: UnitLink) -> bool:
        """Whether looking closer may pay: another unit has a free slot, or the current one is lost."""
        return not current.is_connected or any(
            link is not current and link.is_connected and _num_sequences(link, model) < _num_slots(link, model)
            for link in links
        )

    def _view(
        self, links: Sequence[UnitLink], request: EngineRequest, chains: Chains, current: UnitLink | None = None
    ) -> _View:
        """``chains``: hashes that are known; others are added. ``current``: the unit at which the request is queued
        already, behind those that precede it only.
        """
        hashes = _hashes_of(links, request, chains)
        demands = [link.kv_demand(request, one) for link, one in zip(links, hashes, strict=True)]
        cached = self._cached_tokens(links, request, demands)
        costs = assumed_costs([link.admission.costs.get(request.model) for link in links])
        num_known = len(request.prompt_token_ids) + len(request.resume_token_ids)
        candidates, decode_s = [], []
        for link, num_cached, cost in zip(links, cached, costs, strict=True):
            own_decode_s = cost.decode.decode_s(_decode_steps(request), num_known)
            load = _load_of(link, request.model, own_decode_s, cost)
            if link is current:
                load = _load_before(load, link, request)
            candidates.append(_candidate(link, request, num_known, num_cached, load, cost))
            decode_s.append(own_decode_s)
        return _View(links, demands, candidates, decode_s, chains)

    def _cached_tokens(
        self, links: Sequence[UnitLink], request: EngineRequest, demands: Sequence[KvDemand]
    ) -> list[int]:
        """Tokens of the request that each unit caches, as far as this router knows."""
        if len(links) == 1:
            return [0]
        matched: dict[tuple[bytes, ...], dict[str, int]] = {}
        cached = []
        for link, demand in zip(links, demands, strict=True):
            hashes = demand.block_hashes
            if hashes not in matched:
                matched[hashes] = self.residency.match(block_keys(request.model, hashes))
            num_blocks = matched[hashes].get(link.name, 0)
            block_size = link.models[request.model].config.block_size
            cached.append(min(demand.max_cached_tokens, num_blocks * block_size))
        return cached


def _hashes_of(links: Sequence[UnitLink], request: EngineRequest, chains: Chains) -> list[tuple[bytes, ...] | None]:
    """The hashes of the request's known tokens on each unit, computed once for units with equal KV; None: a unit whose
    weights are not known. Adds those that ``chains`` does not have.
    """
    hashes = []
    for link in links:
        root = link.chain_root(request)
        if root is not None and root not in chains:
            chains[root] = known_hashes(request, *root)
        hashes.append(chains[root])
    return hashes


def _load_of(link: UnitLink, model: str, own_decode_s: float, costs: ModelCosts) -> UnitLoad:
    """What is ahead of a new request: this router's sequences, and those of others as the unit reports them."""
    others_s = sum(
        _prefill_of(link.admission.costs.get(name, costs), report) for name, report in link.admission.loads.items()
    )
    mean_decode_s = link.assigned.mean_decode_s(model)
    return UnitLoad(
        _num_sequences(link, model),
        own_decode_s if mean_decode_s is None else mean_decode_s,
        link.assigned.prefill_s + others_s,
    )


def _prefill_of(costs: ModelCosts, report: ReportedLoad) -> float:
    return costs.prefill.step_s(report.prefill_tokens, report.prefill_context) - costs.prefill.base_s


def _load_before(load: UnitLoad, link: UnitLink, request: EngineRequest) -> UnitLoad:
    """The part of ``load`` that precedes a request which is queued already."""
    num_queued = link.assigned.num(request.model) - link.assigned.num_credited(request.model)
    num_before = link.admission.num_before(request.model, request.tenant, request.scheduling, request.tenant_weight)
    num_behind = max(0, num_queued - num_before)
    behind_s = link.assigned.queued_prefill_s(request.model) * num_behind / num_queued if num_queued else 0.0
    prefill_s = max(0.0, load.prefill_s - behind_s)
    return replace(load, num_sequences=load.num_sequences - num_behind, prefill_s=prefill_s)


def _candidate(
    link: UnitLink, request: EngineRequest, num_known: int, num_cached: int, load: UnitLoad, costs: ModelCosts
) -> Candidate:
    placed, chunk = link.models[request.model], link.models[request.model].config.step_token_budget
    return Candidate(
        link.name,
        num_known,
        num_cached,
        load.wait_s(placed.config.max_num_seqs),
        prefill_s(costs, num_known, num_cached, chunk),
        load.num_sequences,
        fits=request.max_tokens <= placed.capacity_tokens,
        is_connected=link.is_connected,
        is_awake=not link.admission.loads.get(request.model, NO_REPORT).is_asleep,
    )


def _num_sequences(link: UnitLink, model: str) -> int:
    """Sequences of a model that all routers have on a unit."""
    return link.assigned.num(model) + link.admission.loads.get(model, NO_REPORT).num_sequences


def _num_slots(link: UnitLink, model: str) -> int:
    return link.models[model].config.max_num_seqs


def _decode_steps(request: EngineRequest) -> float:
    """Expected decode steps of the output that is left."""
    if request.prediction is None:
        return float(request.stopping.max_new_tokens)
    return max(0.0, request.prediction.p50_tokens - len(request.resume_token_ids) - 1)
