"""The runs of steps that the benchmark of a whole engine times."""

from benchmarks.gpu.whole_engine import LoadedRunner, serve
from muxmesh.clock import ManualClock
from muxmesh.engine.api import EngineJob
from muxmesh.engine.sequence import SequenceRecord
from muxmesh.types import EngineRequest, Sampling, SchedulingState, Stopping
from tests.support.engines import sim_runner


async def test_the_runs_of_all_sequences_are_timed_with_their_steps() -> None:
    request = EngineRequest("r", "m", (5,) * 8, Sampling(), Stopping(20), SchedulingState(0, 0.0))
    jobs = [EngineJob(job, SequenceRecord(request, 16, b"", (0, 1), 7)) for job in range(3)]
    runs = await serve(LoadedRunner(sim_runner(16), 8), 3, 1000, jobs, ManualClock())
    assert [run.num_steps for run in runs] == [8, 8, 4]
    assert all(job.sequence.num_output_tokens == 20 for job in jobs)
