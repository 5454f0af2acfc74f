"""How many sequences may wait, and what a refused request is promised: decisions, and two minutes of overload."""

from __future__ import annotations

import heapq
import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxmesh.errors import Overloaded
from router.queue_limit import QueueLimit, StartRate, WaitingSequences, check_total
from router.tickets import Newcomer

SECRET = bytes(32)


def newcomer(num: int = 1, model: str = "m", tenant: str = "", ticket: str = "") -> Newcomer:
    return Newcomer(model, tenant, num, ticket)


def refusal(limit: QueueLimit, one: Newcomer, waiting: dict[str, int], now_s: float = 0.0) -> Overloaded:
    with pytest.raises(Overloaded) as caught:
        limit.check(one, waiting, now_s, 1000.0 + now_s)
    return caught.value


def test_a_full_queue_refuses_a_request_with_all_its_sequences() -> None:
    limit = QueueLimit(10, SECRET, limits_tenants=False)
    limit.check(newcomer(3), {"m": 7}, 0.0, 0.0)
    error = refusal(limit, newcomer(4), {"m": 7})
    assert str(error) == "7 sequences are waiting and 4 would be added; at most 10 may wait; try again in 1 s"


def test_a_flooded_model_does_not_fill_the_queue_for_others() -> None:
    limit = QueueLimit(10, SECRET, limits_tenants=False)
    limit.check(newcomer(2, "flooded"), {"flooded": 6, "other": 1}, 0.0, 0.0)
    error = refusal(limit, newcomer(3, "flooded"), {"flooded": 6, "other": 1})
    assert "; at most 10 may wait, with 1 kept for other models;" in str(error)
    limit = QueueLimit(10, SECRET, limits_tenants=False)
    assert "2 kept for other models" in str(refusal(limit, newcomer(1, "flooded"), {"flooded": 8, "other": 0}))
    limit = QueueLimit(10, SECRET, limits_tenants=False)
    limit.check(newcomer(2, "other"), {"flooded": 8, "other": 0}, 0.0, 0.0)
    assert "kept" not in str(refusal(limit, newcomer(1, "other"), {"flooded": 8, "other": 2}))


def test_without_tickets_the_same_limits_hold() -> None:
    check_total({"m": 7}, "m", 3, 10)
    check_total({"flooded": 8, "other": 0}, "other", 2, 10)
    with pytest.raises(Overloaded, match=r"at most 10 may wait, with 2 kept for other models$"):
        check_total({"flooded": 8, "other": 0}, "flooded", 1, 10)


def test_one_tenant_fills_two_thirds_and_further_ones_share() -> None:
    limit, waiting = QueueLimit(90, SECRET, limits_tenants=True), Counter({"m": 0})

    def fill(tenant: str) -> int:
        number = 0
        while True:
            try:
                limit.check(newcomer(1, tenant=tenant), waiting, 0.0, 0.0)
            except Overloaded as error:
                problems.append(str(error))
                return number
            limit.enter(tenant, 1, 0.0)
            waiting["m"] += 1
            number += 1

    problems: list[str] = []
    assert fill("a") == 60
    assert fill("b") == 20
    assert fill("c") > 0
    assert all("sequences of this tenant are waiting" in problem for problem in problems)
    unlimited = QueueLimit(90, SECRET, limits_tenants=False)
    unlimited.enter("", 80, 0.0)
    unlimited.check(newcomer(1), {"m": 80}, 0.0, 0.0)


def test_the_delay_is_the_number_before_it_divided_by_the_rate() -> None:
    limit = QueueLimit(10, SECRET, limits_tenants=False)
    one = limit.enter("", 20, 0.0)
    for tenth in range(1, 11):
        one.start(tenth / 2)
    assert refusal(limit, newcomer(1), {"m": 10}, 5.0).retry_after_s == pytest.approx(1 / 2, rel=0.2)
    later = refusal(limit, newcomer(4), {"m": 10}, 5.0)
    assert later.retry_after_s == pytest.approx(5 / 2, rel=0.2), "behind the ticket that is out"
    assert limit.tickets.num_out == 5


def test_with_a_bound_on_waiting_no_more_wait_than_start_in_its_time() -> None:
    limit = QueueLimit(1000, SECRET, limits_tenants=False, longest_wait_s=8.0)
    limit.check(newcomer(999), {"m": 0}, 0.0, 0.0)
    one = limit.enter("", 100, 0.0)
    for number in range(1, 41):
        one.start(number / 4)
    assert limit.limit == pytest.approx(32, abs=3)
    assert "at most 3" in str(refusal(limit, newcomer(1), {"m": 60}, 10.0))
    one.end(10.0)
    limit.check(newcomer(20), {"m": 0}, 500.0, 500.0)
    assert limit.limit == pytest.approx(32, abs=3), "time without a queue says nothing of the rate"


def serving(per_s: int) -> QueueLimit:
    """A queue of which so many sequences have started each second for ten seconds."""
    limit = QueueLimit(1000, SECRET, limits_tenants=False)
    one = limit.enter("", 10 * per_s + 1, 0.0)
    for number in range(1, 10 * per_s + 1):
        one.start(number / per_s)
    return limit


def test_a_request_that_would_start_after_its_deadline_is_refused_with_the_time_when_it_would_not() -> None:
    limit = serving(per_s=4)
    limit.check_deadline(40, 10.5, 10.0)
    limit.check_deadline(10_000, math.inf, 10.0)
    limit.check_deadline(0, 0.001, 10.0)
    with pytest.raises(Overloaded, match="40 sequences start before it, so it would start in about 1") as caught:
        limit.check_deadline(40, 4.0, 10.0)
    assert caught.value.retry_after_s == pytest.approx(6.0, rel=0.1)
    assert (caught.value.ticket, limit.tickets.num_out) == ("", 0)


def test_no_request_is_refused_for_its_deadline_while_nothing_is_known_of_the_rate() -> None:
    QueueLimit(10, SECRET, limits_tenants=False).check_deadline(10, 0.001, 0.0)
    limit = serving(per_s=4)
    with pytest.raises(Overloaded):
        limit.check_deadline(40, 1.0, 11.9)
    limit.check_deadline(40, 1.0, 12.1)  # a model that wakes up, or long outputs: nothing starts


@pytest.mark.parametrize("limits_tenants", [False, True])
def test_a_ticket_that_is_due_may_wait_for_three_quarters_of_the_bound(limits_tenants: bool) -> None:
    """The rate is an estimate. A newcomer waits for half of the bound."""
    limit = QueueLimit(1000, SECRET, limits_tenants, longest_wait_s=8.0)
    one = limit.enter("t", 41, 0.0)
    for number in range(1, 41):
        one.start(number / 4)
    assert 29 <= limit.limit <= 35
    full = {"m": limit.limit + 2}
    refused = refusal(limit, newcomer(1, tenant="t"), full, 10.0)
    holder, due_unix_s = newcomer(1, tenant="t", ticket=refused.ticket), 1010.0 + refused.retry_after_s
    limit.check(holder, full, 10.0, due_unix_s)
    again = refusal(limit, newcomer(1, tenant="t"), full, 10.0)
    holder = newcomer(1, tenant="t", ticket=again.ticket)
    with pytest.raises(Overloaded):
        limit.check(holder, {"m": 2 * limit.limit}, 10.0, 1010.0 + again.retry_after_s)


def test_free_slots_are_always_filled() -> None:
    """On an idle unit a request waits for its prefill only, and is admitted."""
    limit = QueueLimit(1000, SECRET, limits_tenants=False, longest_wait_s=0.01, num_slots=lambda: 8)
    running = [limit.enter("", 1, 0.0) for _ in range(6)]
    for number, one in enumerate(running, 1):
        one.start(float(number))
    assert limit.limit == 8 - 6
    limit.check(newcomer(2), {"m": 0}, 6.0, 6.0)
    refusal(limit, newcomer(3), {"m": 0}, 6.0)
    for one in running:
        one.end(7.0)
    assert limit.limit == 8


def test_who_comes_back_with_a_ticket_goes_before_newcomers() -> None:
    limit = QueueLimit(10, SECRET, limits_tenants=False)
    ticket = refusal(limit, newcomer(1), {"m": 10}).ticket
    assert "1 for tickets of earlier requests" in str(refusal(limit, newcomer(1), {"m": 9}, 1.0))
    limit.check(newcomer(1, ticket=ticket), {"m": 9}, 1.0, 1001.0)
    limit.check(newcomer(1), {"m": 8}, 1.0, 1001.0)


def test_a_ticket_is_good_once_for_its_tenant_model_and_size() -> None:
    limit = QueueLimit(10, SECRET, limits_tenants=True)
    ticket = refusal(limit, newcomer(2, tenant="t"), {"m": 10, "n": 0}).ticket
    full = {"m": 10, "n": 0}
    for other in (
        newcomer(2, tenant="u", ticket=ticket), newcomer(2, "n", "t", ticket), newcomer(3, tenant="t", ticket=ticket),
        newcomer(2, tenant="t", ticket=ticket[:-1] + "x"), newcomer(2, tenant="t", ticket="nonsense"),
        newcomer(2, tenant="t", ticket="1-1-1-1-é"),
    ):  # fmt: skip
        assert refusal(limit, other, full, 1.0).ticket != ticket
    limit.check(newcomer(2, tenant="t", ticket=ticket), {"m": 7, "n": 0}, 1.0, 1001.0)
    assert refusal(limit, newcomer(2, tenant="t", ticket=ticket), full, 1.0).ticket != ticket


def test_who_comes_too_early_keeps_the_position_and_who_comes_too_late_loses_it() -> None:
    limit = QueueLimit(10, SECRET, limits_tenants=False)
    first = refusal(limit, newcomer(1), {"m": 10})
    early = refusal(limit, newcomer(1, ticket=first.ticket), {"m": 10}, 0.5)
    assert early.ticket == first.ticket
    assert early.retry_after_s == pytest.approx(0.5)
    late = refusal(limit, newcomer(1, ticket=first.ticket), {"m": 10}, 6.1)
    assert late.ticket != first.ticket
    assert limit.tickets.num_out == 1


def test_tickets_of_one_tenant_keep_no_other_out_and_no_limit_is_passed_with_them() -> None:
    limit, waiting = QueueLimit(30, SECRET, limits_tenants=True), {"m": 22, "n": 0}
    limit.enter("a", 22, 0.0)
    tickets = [refusal(limit, newcomer(1, tenant="a"), waiting).ticket for _ in range(40)]
    limit.check(newcomer(1, tenant="b"), waiting, 0.5, 1000.5)
    limit.enter("b", 1, 0.5)
    with_ticket = newcomer(1, tenant="a", ticket=tickets[0])
    assert "of this tenant are waiting" in str(refusal(limit, with_ticket, waiting, 1.0))
    kept = refusal(limit, newcomer(1, tenant="a", ticket=tickets[1]), {"m": 28, "n": 0}, 1.0)
    assert "kept for other models" in str(kept)


def test_a_ticket_that_is_not_due_is_no_hindrance_where_there_is_a_free_position() -> None:
    limit = QueueLimit(10, SECRET, limits_tenants=False)
    ticket = refusal(limit, newcomer(1), {"m": 10}).ticket
    limit.check(newcomer(1, ticket=ticket), {"m": 1}, 0.2, 1000.2)
    assert limit.tickets.num_out == 0


def test_another_router_honours_a_ticket() -> None:
    first, second = (QueueLimit(10, SECRET, limits_tenants=False) for _ in range(2))
    ticket = refusal(first, newcomer(1), {"m": 10}).ticket
    second.check(newcomer(1, ticket=ticket), {"m": 10}, 1.0, 1001.0)
    assert refusal(second, newcomer(1, ticket=ticket), {"m": 10}, 1.0).ticket != ticket
    stranger = QueueLimit(10, bytes(31) + b"x", limits_tenants=False)
    assert refusal(stranger, newcomer(1, ticket=ticket), {"m": 10}, 1.0).ticket != ticket


def test_tickets_of_which_few_come_back_count_little() -> None:
    limit = QueueLimit(10, SECRET, limits_tenants=False)
    for second in range(600):
        refusal(limit, newcomer(1), {"m": 10}, float(second))
    assert limit.tickets.return_rate < 0.05
    limit.check(newcomer(1), {"m": 8}, 600.0, 1600.0)
    assert limit.tickets.num_out <= 4


@given(st.text(max_size=80))
def test_no_ticket_raises_anything_but_a_refusal(ticket: str) -> None:
    limit = QueueLimit(1, SECRET, limits_tenants=True)
    refusal(limit, newcomer(1, ticket=ticket), {"m": 1})


def test_the_rate_counts_the_time_in_which_sequences_wait() -> None:
    rate = StartRate()
    rate.advance(0.0, is_waiting=False)
    assert rate.per_s == 0.0
    for number in range(1, 101):
        rate.advance(number / 10, is_waiting=True)
        rate.start()
    assert rate.per_s == pytest.approx(10.0, rel=0.05)
    rate.advance(500.0, is_waiting=False)
    assert rate.per_s == pytest.approx(10.0, rel=0.05)
    for number in range(1, 101):
        rate.advance(500.0 + number, is_waiting=True)
        rate.start()
    assert rate.per_s == pytest.approx(1.0, rel=0.1)


class Overload:
    """An open load in virtual time on a queue whose sequences start at ``capacity`` a second, in order of arrival."""

    def __init__(
        self, load: float, capacity: float, limit: int, share_that_returns: float, seed: int, wait_s: float = math.inf
    ) -> None:
        self.limit, self.capacity = QueueLimit(limit, SECRET, False, wait_s), capacity
        self.rng, self.returns = random.Random(seed), share_that_returns
        self.events: list[tuple[float, int, str, str, float]] = []
        self.waiting: list[tuple[float, WaitingSequences]] = []
        self.counts: Counter[str] = Counter()
        self.waits_s: list[float] = []
        self.ratios: list[float] = []
        self._number = 0
        at_s = 0.0
        while at_s < 120:
            at_s += self.rng.expovariate(load * capacity)
            self.push(at_s, "arrive")
        for index in range(int(120 * capacity)):
            self.push((index + 1) / capacity, "serve")

    def push(self, at_s: float, what: str, ticket: str = "") -> None:
        self._number += 1
        heapq.heappush(self.events, (at_s, self._number, what, ticket, at_s))

    def run(self) -> None:
        while self.events and self.events[0][0] < 120:
            now_s, _, what, ticket, _ = heapq.heappop(self.events)
            if what == "serve":
                if self.waiting:
                    arrived_s, one = self.waiting.pop(0)
                    one.start(now_s)
                    self.waits_s.append(now_s - arrived_s)
                continue
            self.arrive(now_s, ticket)

    def arrive(self, now_s: float, ticket: str) -> None:
        kind = "holder" if ticket else "newcomer"
        num_out = self.limit.tickets.num_out
        try:
            self.limit.check(newcomer(1, ticket=ticket), {"m": len(self.waiting)}, now_s, now_s)
        except Overloaded as error:
            self.counts[f"{kind} refused"] += 1
            backlog = max(1, len(self.waiting) + math.ceil(num_out * self.limit.tickets.expected_return) + 1 - 100)
            if now_s > 20 and kind == "newcomer":
                self.ratios.append(error.retry_after_s / (backlog / self.capacity))
            if self.rng.random() < self.returns:
                self.push(now_s + error.retry_after_s, "return", error.ticket)
        else:
            self.counts[f"{kind} admitted"] += 1
            self.waiting.append((now_s, self.limit.enter("", 1, now_s)))


@pytest.mark.parametrize(("load", "returns"), [(1.2, 1.0), (3.0, 1.0), (1.2, 0.3), (3.0, 0.3), (3.0, 0.7), (3.0, 0.0)])
def test_under_overload_tickets_are_true_and_waits_bounded(load: float, returns: float) -> None:
    overload = Overload(load, capacity=20.0, limit=100, share_that_returns=returns, seed=3)
    overload.run()
    counts = overload.counts
    holders = counts["holder admitted"] + counts["holder refused"]
    assert counts["newcomer refused"] > 100
    if returns:
        assert counts["holder admitted"] >= 0.95 * holders > 50
    assert max(overload.waits_s) <= 1.15 * 100 / 20, "no more than a full queue and its headroom wait before it"
    assert max(overload.ratios) <= 1.5
    assert len(overload.waits_s) >= 0.97 * 120 * 20, "the capacity is used"


@pytest.mark.parametrize("load", [1.2, 3.0])
def test_under_overload_no_wait_exceeds_the_bound(load: float) -> None:
    """A queue of 10,000 would take 500 s; with a bound of 20 s no more wait than start in 10 s."""
    overload = Overload(load, capacity=20.0, limit=10_000, share_that_returns=1.0, seed=4, wait_s=10.0)
    overload.run()
    assert max(overload.waits_s) <= 20.0
    assert len(overload.waits_s) >= 0.97 * 120 * 20
    holders = overload.counts["holder admitted"] + overload.counts["holder refused"]
    assert overload.counts["holder admitted"] >= 0.95 * holders > 50
