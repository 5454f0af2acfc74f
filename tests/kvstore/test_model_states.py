"""The states of a unit's models, with workers that do what they are told when the test lets them."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.model_states import PATIENCE_S, STUCK_S, AwakeLimits, ModelState, ModelStates, ModelUse
from kvstore.worker_slots import EngineState, WorkerRecord
from muxmesh.types import Role

AWAKE, FALLING, ASLEEP, WAKING = ModelState
IDLE_S = 60.0


class Models:
    """`ModelStates` of models with a prefill and a decode worker each, whose use a test sets."""

    def __init__(
        self,
        names: str = "abc",
        max_awake: int | None = None,
        idle_sleep_s: float | None = None,
        pinned: str = "",
        cold: str = "",
    ) -> None:
        self.states = ModelStates(AwakeLimits(max_awake, idle_sleep_s))
        self.use = {name: ModelUse() for name in names}
        self.workers: list[WorkerRecord] = []
        self.now_s = 0.0
        self.returned: list[str] = []
        for name in names:
            self.states.add_model(name, name in pinned, name in cold, self.now_s)
            for role in Role:
                self.attach(name, role)

    def attach(self, model: str, role: Role) -> None:
        engine = self.states.engine_of(model)
        name = f"{role}-{model}-{len(self.workers)}"
        self.workers.append(WorkerRecord(name, role, model, "x", 1, ready=True, told=engine, engine=engine))

    def update(self, seconds: float = 0.0) -> list[str]:
        """Names of the workers that are told something."""
        self.now_s += seconds
        changes = self.states.update(self.now_s, self.use, self.workers)
        self.returned += changes.returned
        self.states.check_integrity()
        return [command.worker for command in changes.commands]

    def obey(self, model: str = "") -> None:
        for worker in self.workers:
            if model in ("", worker.model):
                worker.report(worker.num_told)

    def settle(self) -> None:
        """Lets workers obey until nothing changes any more."""
        for _ in range(8):
            self.obey()
            self.update()

    def run(self, model: str, num_leases: int = 0, num_queued: int = 0) -> None:
        self.use[model] = ModelUse(num_leases, num_queued)

    def state(self, model: str) -> ModelState:
        return self.states.models[model].state

    @property
    def awake(self) -> str:
        return "".join(name for name in self.use if self.state(name) is AWAKE)


@pytest.mark.parametrize(
    ("settings", "awake"),
    [
        ({}, "abc"),
        ({"max_awake": 2}, "ab"),
        ({"cold": "a"}, "bc"),
        ({"max_awake": 1, "cold": "a"}, "b"),
        ({"max_awake": 3}, "abc"),
    ],
)
def test_models_start_awake_as_far_as_the_limit_permits(settings: dict[str, object], awake: str) -> None:
    models = Models(**settings)  # type: ignore[arg-type]
    assert models.awake == awake
    assert all((worker.engine is EngineState.AWAKE) == (worker.model in awake) for worker in models.workers)
    assert not models.update(), "no command repeats what a worker learned at its attachment"


def test_a_request_wakes_a_model_and_the_least_recently_used_idle_one_sleeps_for_it() -> None:
    models = Models(max_awake=2)
    models.run("a", num_leases=1)
    models.update()
    models.run("a")
    models.update(1)
    models.run("c", num_queued=1)
    assert [name[:-2] for name in models.update(1)] == ["prefill-b", "decode-b"]
    assert (models.state("b"), models.state("c")) == (FALLING, ASLEEP)
    assert models.returned == ["b"], "its KV is returned at once: it had no lease"
    models.obey()
    assert [name[:-2] for name in models.update()] == ["prefill-c", "decode-c"]
    assert (models.state("b"), models.state("c")) == (ASLEEP, WAKING)
    models.obey()
    models.update(0.5)
    assert models.awake == "ac"
    assert models.states.models["c"].num_wakes == 1 and models.states.models["c"].last_waking_s == 0.5


def test_a_model_with_leases_is_evicted_only_after_the_patience_and_finishes_them_first() -> None:
    models = Models("ab", max_awake=1)
    models.run("a", num_leases=2, num_queued=1)
    models.run("b", num_queued=1)
    models.update()
    assert models.awake == "a"
    assert models.states.next_change_s() == PATIENCE_S
    models.update(PATIENCE_S)
    assert models.state("a") is FALLING and not models.returned, "its sequences run on"
    assert not models.states.admits("a")
    models.run("a", num_queued=1)
    assert models.update(3) and models.returned == ["a"]
    models.settle()
    assert models.awake == "b"
    models.run("b", num_leases=1, num_queued=5)
    models.update(PATIENCE_S)
    assert models.state("b") is FALLING
    models.run("b", num_queued=5)
    models.settle()
    assert models.awake == "a", "they take turns"


def test_a_model_that_finishes_its_sequences_stays_awake_if_another_one_is_idle_before() -> None:
    models = Models("abc", max_awake=2)
    models.run("a", num_leases=1)
    models.run("b", num_leases=2)
    models.run("c", num_queued=1)
    models.update()
    models.update(PATIENCE_S)
    assert (models.state("a"), models.state("b")) == (FALLING, AWAKE)
    models.run("b")
    models.update(1)
    assert (models.state("a"), models.state("b")) == (AWAKE, FALLING)
    models.settle()
    assert models.awake == "ac" and not any(worker.num_told for worker in models.workers if worker.model == "a")


def falling_asleep_for_b() -> Models:
    """One of two models may be awake: a, which has a lease, falls asleep since b has waited for its patience."""
    models = Models("ab", max_awake=1)
    models.run("a", num_leases=1)
    models.run("b", num_queued=1)
    models.update()
    models.update(PATIENCE_S)
    assert models.state("a") is FALLING
    return models


def test_a_model_stays_awake_if_the_requests_that_it_should_make_space_for_are_withdrawn() -> None:
    models = falling_asleep_for_b()
    models.run("b")
    models.update(1)
    assert models.awake == "a" and models.states.admits("a")
    models.states.sleep("a", models.now_s)
    models.update(1)
    assert models.state("a") is FALLING, "by command it falls asleep all the same"


def test_of_busy_models_the_one_with_the_fewest_requests_falls_asleep() -> None:
    models = Models("abc", max_awake=2)
    models.run("a", num_leases=1, num_queued=2)
    models.run("b", num_leases=2)
    models.run("c", num_queued=1)
    models.update()
    models.update(PATIENCE_S)
    assert (models.state("a"), models.state("b")) == (AWAKE, FALLING)


def test_models_wake_in_the_order_in_which_they_began_to_wait() -> None:
    models = Models("abc", max_awake=1)
    models.run("a", num_leases=1)
    models.run("c", num_queued=1)
    models.update()
    models.run("b", num_queued=9)
    models.update(1)
    models.run("a")
    models.update(1)
    models.settle()
    assert models.awake == "c"


def test_an_idle_model_falls_asleep_after_the_time_that_is_set_and_a_pinned_one_never() -> None:
    models = Models("abc", idle_sleep_s=IDLE_S, pinned="b")
    models.run("a", num_leases=1)
    models.update(IDLE_S - 1)
    models.run("a")
    models.update(1)
    assert (models.state("a"), models.state("b"), models.state("c")) == (AWAKE, AWAKE, FALLING)
    assert models.states.next_change_s() == 2 * IDLE_S, "the end of the lease was its last use"
    models.settle()
    models.update(IDLE_S)
    models.settle()
    assert models.awake == "b"
    assert models.states.next_change_s() is None


def test_a_pinned_model_is_not_evicted_but_sleeps_when_it_is_told_to() -> None:
    models = Models("ab", max_awake=1, pinned="a")
    models.run("b", num_queued=1)
    models.update(100)
    assert models.awake == "a" and models.states.next_change_s() is None
    models.states.sleep("a", models.now_s)
    models.settle()
    assert models.awake == "b"


def test_a_model_that_is_told_to_sleep_wakes_again_for_the_requests_that_are_queued() -> None:
    models = Models("a")
    models.run("a", num_leases=1, num_queued=1)
    models.states.sleep("a", models.now_s)
    assert not models.update()
    models.run("a", num_queued=1)
    assert models.update()
    models.obey()
    models.settle()
    assert models.awake == "a" and models.states.models["a"].num_wakes == 1


def test_weights_are_dropped_on_request_also_of_a_model_that_sleeps() -> None:
    models = Models("a")
    models.states.sleep("a", 0.0)
    models.settle()
    assert {worker.engine for worker in models.workers} == {EngineState.ASLEEP}
    models.states.sleep("a", 0.0, drop_weights=True)
    models.settle()
    assert {worker.engine for worker in models.workers} == {EngineState.DROPPED}
    assert models.state("a") is ASLEEP


def test_the_command_wakes_a_model_that_has_no_request() -> None:
    models = Models("ab", max_awake=1)
    models.states.wake("b")
    models.settle()
    assert models.awake == "b"


def test_a_model_that_stays_awake_after_all_is_not_woken_by_an_earlier_command() -> None:
    models = falling_asleep_for_b()
    models.states.wake("a")
    models.run("b")
    models.update(1)
    assert models.awake == "a", "b waits no longer"
    models.run("a")
    models.run("b", num_queued=1)
    models.settle()
    assert models.awake == "b"
    models.run("b")
    models.settle()
    assert models.awake == "b", "the command is done"


def test_a_model_that_does_not_get_awake_makes_space_for_others_after_a_while() -> None:
    models = Models("ab", max_awake=1)
    models.run("b", num_queued=1)
    models.update()
    models.obey("a")
    models.update()
    assert models.state("b") is WAKING
    models.run("a", num_queued=5)
    models.update(1)
    assert models.states.next_change_s() == STUCK_S
    models.update(STUCK_S - 2)
    assert models.state("b") is WAKING
    models.update(1)
    models.settle()
    assert models.awake == "a", "b began to wait before, but had its turn"
    assert models.states.models["b"].num_wakes == 0


def test_a_report_of_an_earlier_command_does_not_count() -> None:
    models = Models("a")
    models.states.sleep("a", 0.0)
    models.settle()
    models.states.wake("a")
    models.update()
    (number,) = {worker.num_told for worker in models.workers}
    models.states.sleep("a", 0.0)
    models.update()
    for worker in models.workers:
        worker.report(number)  # it woke before it read the next command
    models.update()
    assert models.state("a") is FALLING
    models.obey()
    models.update()
    assert models.state("a") is ASLEEP


@pytest.mark.parametrize("state", [FALLING, WAKING])
def test_a_worker_that_dies_while_its_model_changes_delays_nothing_for_ever(state: ModelState) -> None:
    models = Models("a", cold="a" if state is WAKING else "")
    if state is WAKING:
        models.states.wake("a")
    else:
        models.states.sleep("a", 0.0)
    models.update()
    models.obey()
    models.workers.pop()
    models.attach("a", Role.DECODE)
    models.update()
    assert models.state("a") is (AWAKE if state is WAKING else ASLEEP)


@given(st.data())
def test_no_model_waits_for_ever_and_the_limit_holds(data: st.DataObject) -> None:
    """Requests of random models, workers that die and obey late; at the end every model with requests had its turn."""
    models = Models("abcd", max_awake=data.draw(st.integers(1, 3)), idle_sleep_s=IDLE_S)
    for _ in range(data.draw(st.integers(1, 30))):
        name = data.draw(st.sampled_from("abcd"))
        action = data.draw(st.sampled_from(["queue", "end", "obey", "wait", "die", "sleep", "wake"]))
        _act(models, name, action)
        models.update()
        for model, used in models.use.items():
            assert not (used.num_leases and models.state(model) is ASLEEP), "a model with leases sleeps"
    waiting = [name for name, used in models.use.items() if used.num_queued]
    for _ in range(30):
        _serve(models, waiting)
        models.obey()
        models.update(PATIENCE_S)
    assert not any(used.num_queued for used in models.use.values())


def _act(models: Models, name: str, action: str) -> None:
    used = models.use[name]
    if action == "queue":
        models.run(name, used.num_leases, used.num_queued + 1)
    elif action == "end":
        models.run(name, max(0, used.num_leases - 1), used.num_queued)
    elif action == "obey":
        models.obey(name)
    elif action == "wait":
        models.now_s += PATIENCE_S
    elif action == "die":
        models.workers = [worker for worker in models.workers if worker.model != name]
        for role in Role:
            models.attach(name, role)
    elif action == "sleep":
        models.states.sleep(name, models.now_s)
    else:
        models.states.wake(name)
    _serve(models, models.use)


def _serve(models: Models, names: Sequence[str] | dict[str, ModelUse]) -> None:
    """Awake models turn queued requests into leases, and end earlier ones."""
    for name in models.use:
        used = models.use[name]
        if models.state(name) is AWAKE and name in names:
            models.run(name, used.num_queued)
        elif models.state(name) is FALLING:
            models.run(name, 0, used.num_queued)
