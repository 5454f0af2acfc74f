"""Both estimators over MuxServe's profile, and the cluster that they plan for. Pure; searches and replays nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from benchmarks.muxserve.constants import Constants
from benchmarks.muxserve.measured_cases import OVER_SUBSCRIPTION
from muxmesh.placement.corrected_estimator import CorrectedEstimator
from muxmesh.placement.plan import SHAREGPT_OUTPUT_TOKENS, SHAREGPT_PROMPT_TOKENS, Cluster, ModelLoad
from muxmesh.placement.profile import Profile
from muxmesh.placement.reference_estimator import ReferenceEstimator
from muxmesh.placement.step_table import StepTable
from muxmesh.placement.unit_choices import Objective, UnitChoices

NUM_NODES, DEVICES_PER_NODE = 4, 8


class Estimators:
    """MuxServe's estimator as published, and the corrected one with what was fitted to MuxServe's runs."""

    def __init__(
        self,
        profile: Profile,
        constants: Constants,
        cluster: Cluster,
        prompt_tokens: int = SHAREGPT_PROMPT_TOKENS,
        output_tokens: int = SHAREGPT_OUTPUT_TOKENS,
    ) -> None:
        """``prompt_tokens`` and ``output_tokens``: of MuxServe's estimator, which has one length for all models."""
        self.profile = slowed(profile, constants)
        self.cluster = cluster
        self.reference = ReferenceEstimator(profile, prompt_tokens, output_tokens)
        self.corrected = CorrectedEstimator(self.profile, cluster)

    def choices(self, loads: Sequence[ModelLoad], objective: Objective) -> UnitChoices:
        """For a search."""
        return UnitChoices(loads, self.profile, self.cluster, objective, self.reference, self.corrected)


def cluster_of(constants: Constants) -> Cluster:
    """32 devices, with the memory that weights and KV have."""
    memory = int(constants.device_memory_bytes * constants.memory_fraction)
    return Cluster(NUM_NODES, DEVICES_PER_NODE, memory, over_subscription=OVER_SUBSCRIPTION)


def slowed(profile: Profile, constants: Constants) -> Profile:
    """The profile as the planner has to see it: with the overhead of every step, and the contention."""
    factor = 1 + constants.overhead

    def table(one: StepTable) -> StepTable:
        return replace(one, prefill=one.prefill * factor, decode=one.decode * factor)

    models = {
        name: replace(one, tables={degree: table(of_degree) for degree, of_degree in one.tables.items()})
        for name, one in profile.models.items()
    }
    return replace(profile, models=models, contention=constants.contention)
