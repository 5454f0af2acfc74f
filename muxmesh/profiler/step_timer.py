"""Times steps of one model: its scheduler and its runner, driven as a worker's engine drives them.

Each sequence is one of random tokens in token blocks of its own. A decode step needs the KV of a context and not the
prefill of it, so the blocks are taken as computed; their memory has to hold numbers. Knows no processes and no shares.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from itertools import pairwise
from random import Random

from muxmesh.clock import Clock
from muxmesh.engine.api import EngineJob, Failed
from muxmesh.engine.scheduler import Scheduler
from muxmesh.engine.sequence import SequenceRecord
from muxmesh.engine.step import Runner
from muxmesh.errors import EngineFailed
from muxmesh.profiler.grid import DECODE_STEPS
from muxmesh.types import EngineRequest, Role, Sampling, SchedulingState, Stopping, blocks_for

_WARM_UP_STEPS = 2
_PACED_WARM_UP_S = 1.0
"""Until then a worker may have used more than its share of a CPU; see `worker.share_pacer`."""
_LEAST_S = 0.3
"""Short steps are repeated for so long, so that one stall of the machine does not matter."""


Fill = Callable[[int], None]
"""Makes sure that the token blocks [0, n) hold numbers, as if their KV had been computed."""


class StepTimer:
    """Owns the scheduler, which has no job between two measurements."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        block_size: int,
        max_model_len: int,
        clock: Clock,
        fill: Fill = lambda num_blocks: None,
        pause: Callable[[], None] | None = None,
    ) -> None:
        """``runner`` is loaded. ``pause`` is called after each step and holds this process to its share, if set."""
        self._scheduler = scheduler
        self._runner = runner
        self._block_size = block_size
        self._max_model_len = max_model_len
        self._clock = clock
        self._fill = fill
        self._pause = pause
        self._random = Random(0)
        self._last_id = 0

    def samples(self, role: Role, batch: int, length: int, repeats: int, longest_s: float) -> list[float]:
        """Seconds of each repetition after a warm-up; see `Cell` for what is repeated.

        At least ``repeats``, and more of short ones; fewer, but one at least, after ``longest_s`` seconds. Raises
        EngineFailed if the engine cannot compute a step.
        """
        times = self._each(role, batch, length)
        warm_up = [next(times) for _ in range(_WARM_UP_STEPS if role == Role.DECODE else 1)]
        while self._pause is not None and sum(warm_up) < _PACED_WARM_UP_S:
            warm_up.append(next(times))
        samples = [] if warm_up[-1] < longest_s else warm_up[-1:]  # so long that it does not matter what was cold
        while not samples or sum(samples) + warm_up[-1] < longest_s:
            samples.append(next(times))
            if len(samples) >= repeats and sum(samples) >= min(_LEAST_S, longest_s / 2):
                break
        times.close()
        self._drop()
        return samples

    def intervals(
        self, role: Role, batch: int, length: int, from_s: float, until_s: float
    ) -> list[tuple[float, float]]:
        """Start and end of each repetition, one after another, that begins and ends in [from_s, until_s).

        Both are monotonic times; the repetitions begin at once and go on until ``until_s``, so that processes that
        measure the same interval all compute in all of it. Steps that the engine computes in a row are equally long.
        Raises EngineFailed, see `samples`.
        """
        times, inside = self._times(role, batch, length), []
        while (began_s := self._clock.monotonic_s()) < until_s:
            _, count = next(times)
            ended_s = self._clock.monotonic_s()
            step_s = (ended_s - began_s) / count
            bounds = [*(began_s + index * step_s for index in range(count)), ended_s]
            inside += [(start, end) for start, end in pairwise(bounds) if from_s <= start and end < until_s]
        times.close()
        self._drop()
        return inside

    def _each(self, role: Role, batch: int, length: int) -> Generator[float, None, None]:
        """Seconds of one repetition after another, without end."""
        for seconds, count in self._times(role, batch, length):
            yield from [seconds] * count

    def _times(self, role: Role, batch: int, length: int) -> Generator[tuple[float, int], None, None]:
        """(seconds of a repetition, how many were computed in a row), without end."""
        while True:
            if role == Role.PREFILL:
                yield self._prefill(batch, length), 1
            else:
                yield from self._decode(batch, length)

    def _prefill(self, batch: int, length: int) -> float:
        started_at_s = self._clock.monotonic_s()
        self._add(batch, length, num_computed=0, max_new_tokens=1)
        while self._scheduler.has_work():
            self._step()
        return self._clock.monotonic_s() - started_at_s

    def _decode(self, batch: int, length: int) -> Generator[tuple[float, int], None, None]:
        steps = min(DECODE_STEPS, self._max_model_len - length)
        self._add(batch, length, num_computed=length - 1, max_new_tokens=steps)
        while self._scheduler.has_work():
            started_at_s = self._clock.monotonic_s()
            num_steps = self._step()
            yield (self._clock.monotonic_s() - started_at_s) / num_steps, num_steps

    def _add(self, batch: int, length: int, num_computed: int, max_new_tokens: int) -> None:
        """Adds ``batch`` sequences of ``length`` known tokens, of which ``num_computed`` are computed."""
        self._drop()
        count = blocks_for(length + max_new_tokens, self._block_size)
        self._fill(batch * count)
        for index in range(batch):
            self._last_id += 1
            tokens = tuple(self._random.choices(range(self._scheduler.vocab_size), k=length))
            request = EngineRequest(
                str(self._last_id), "", tokens, Sampling(seed=self._last_id), Stopping(max_new_tokens),
                SchedulingState(0, float(self._last_id)),
            )  # fmt: skip
            blocks = tuple(range(index * count, (index + 1) * count))
            sequence = SequenceRecord(request, self._block_size, b"", blocks, num_computed)
            self._scheduler.add(EngineJob(self._last_id, sequence, max_new_tokens))

    def _step(self) -> int:
        """Plans, computes and applies one step or run of steps. Returns how many were computed."""
        step = self._scheduler.next_step(self._clock.unix_s(), self._runner.max_steps)
        assert step is not None, "a job is ready"
        outcome = self._runner.run(step, lambda: True)
        self._scheduler.apply(outcome)
        for _, event in self._scheduler.drain_events():
            if isinstance(event, Failed):
                raise EngineFailed(f"a step cannot be computed: {event.reason}")
        if self._pause is not None:
            self._pause()
        return outcome.num_steps

    def _drop(self) -> None:
        self._scheduler.fail_all(Failed("the measurement has ended"))
        self._scheduler.drain_events()
