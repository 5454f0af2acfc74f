"""An upper bound of what any plan reaches on the corrected estimator. Pure.

In a unit of n devices prefills of all models exclude each other, and decodes run in the rest of the time only, on
shares whose sum is at most s (1.2 with 20 % over-subscription). With x_m requests per second of model m:

    sum over m of x_m * P_m(n) = u                              time for prefills
    x_m <= (1 - u) * X_m(n, share_m),  sum of share_m <= s      decodes in the rest of the time

Hence sum over m of x_m * (n * P_m(n) + n * share_m / (s * X_m(n, share_m))) <= n * u + n * (1 - u) = n. Let c_m be the
least cost in the bracket over all n and shares. Over all units x satisfies sum of c_m * x_m <= number of devices, and
x_m <= min(rate, best alone): a fractional knapsack, whose optimum bounds every plan, since contention, memory, whole
units and models that are not split only take from it.
"""

from __future__ import annotations

from collections.abc import Sequence

from muxmesh.placement.corrected_estimator import CorrectedEstimator
from muxmesh.placement.plan import Cluster, ModelLoad
from muxmesh.placement.profile import Profile
from muxmesh.placement.unit_choices import prefill_share


def throughput_bound(
    loads: Sequence[ModelLoad], profile: Profile, cluster: Cluster, corrected: CorrectedEstimator
) -> float:
    """The rate-weighted mean throughput that no plan exceeds, in requests per second."""
    bounds = [_bounds(load, profile, cluster, corrected) for load in loads]
    left = float(cluster.num_devices)
    reached = 0.0
    worth = sorted(zip(loads, bounds, strict=True), key=lambda one: one[0].rate / one[1][0], reverse=True)
    for load, (cost, most) in worth:
        served = min(most, left / cost)
        left -= served * cost
        reached += load.rate * served
    return reached / sum(load.rate for load in loads)


def _bounds(load: ModelLoad, profile: Profile, cluster: Cluster, corrected: CorrectedEstimator) -> tuple[float, float]:
    """The least device-seconds of a request, and the most requests per second of the model on one unit."""
    least, most = float("inf"), 0.0
    of_prefill = prefill_share(profile, load.kind)
    for size, table in profile.models[load.kind].tables.items():
        if size not in cluster.unit_sizes:
            continue
        for share in table.shares:
            prefill_s, best_rate = corrected.limits(load, size, of_prefill, share)
            least = min(least, size * prefill_s + size * share / cluster.max_share / best_rate)
            most = max(most, best_rate / (1 + best_rate * prefill_s))
    return least, min(load.rate, most)
