from dataclasses import replace

import pytest

from muxmesh.types import Role
from simulator.unit_use import WorkerUse
from tests.support.simulations import STEP_S, sim_mesh, sim_model
from tests.support.unit_bench import Bench


def test_the_use_of_a_unit_has_its_workers_with_their_shares_and_grants() -> None:
    bench = Bench(sim_mesh(sim_model("a", compute_share={"prefill": 50, "decode": 25})))
    bench.request_at(0.0, num_output=11, model="a")
    bench.run()
    use = bench.unit.use
    assert [replace(worker, granted_s=0.0) for worker in use.workers] == [
        WorkerUse("a", Role.PREFILL, 0.5, 0.0, 1), WorkerUse("a", Role.DECODE, 0.25, 0.0, 1)
    ]  # fmt: skip
    assert [worker.granted_s for worker in use.workers] == pytest.approx([2 * STEP_S, 40 * STEP_S])
    assert use.peak_share == 0.5
    assert (use.busy_s, use.share_s) == pytest.approx((42 * STEP_S, 11 * STEP_S)) and use.switches == {}
