import itertools
import random

import pytest

from muxmesh.cuda.sm_groups import SmGroups, SmShare, divide, joining

H200 = SmGroups(count=15, num_sms=8)
NUM_SMS = 132


def counts(*shares: int) -> list[int]:
    return [len(groups) for groups in divide(shares, H200, NUM_SMS)]


def shared(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    return len(set(one) & set(other))


def test_a_share_has_the_groups_that_it_pays_for() -> None:
    assert counts(40, 30, 50, 99, 100, 6, 1) == [6, 4, 8, 15, 15, 1, 1]


@pytest.mark.parametrize(
    ("shares", "expected"),
    [((50, 50), [8, 7]), ((75, 25), [11, 4]), ((80, 20), [12, 3]), ((33, 33, 34), [5, 5, 5]), ((40, 30), [6, 4])],
)
def test_shares_that_add_up_to_100_have_no_more_than_all_groups(shares: tuple[int, ...], expected: list[int]) -> None:
    assert counts(*shares) == expected


def test_shares_that_fit_beside_each_other_have_no_group_in_common() -> None:
    chance = random.Random(1)
    for _ in range(500):
        cuts = sorted(chance.sample(range(1, 100), chance.randint(1, 5)))
        shares = tuple(end - begin for begin, end in itertools.pairwise([0, *cuts, 100]))
        if min(shares) * H200.count < 100:
            continue  # less than one group
        chance_shares = shares[: chance.randint(2, len(shares))]
        for one, other in itertools.combinations(divide(chance_shares, H200, NUM_SMS), 2):
            assert not shared(one, other), chance_shares


def test_a_model_that_is_added_leaves_the_groups_of_the_others() -> None:
    before = (40, 30, 60, 20)
    assert divide((*before, 50, 10), H200, NUM_SMS)[:4] == divide(before, H200, NUM_SMS)


def test_workers_that_may_not_compute_together_share_before_those_that_may() -> None:
    large, other_large, small = divide((70, 60, 30), H200, NUM_SMS)
    assert shared(large, other_large) == 11 + 9 - 15, "no more than their sum is above all groups"
    assert not set(large) & set(other_large) & set(small)


def test_a_small_share_meets_each_large_one_equally() -> None:
    large, other_large, small = divide((60, 60, 40), H200, NUM_SMS)
    assert shared(small, large) == shared(small, other_large) == 3


def test_three_models_meet_in_as_few_groups_as_their_sum_allows() -> None:
    used = [group for groups in divide((40, 30) * 3, H200, NUM_SMS) for group in groups]
    assert len(used) == 30 and all(used.count(group) == 2 for group in range(15))


def test_a_worker_with_the_whole_gpu_crowds_nobody_out() -> None:
    assert divide((100, 40, 30), H200, NUM_SMS)[1:] == divide((40, 30), H200, NUM_SMS)


def test_each_process_comes_to_the_same_division() -> None:
    shares = (40, 30, 60, 50, 100, 10)
    expected = divide(shares, H200, NUM_SMS)
    assert [SmShare(shares, index).groups(H200, NUM_SMS) for index in range(6)] == expected


def test_a_process_by_itself_has_what_it_pays_for() -> None:
    assert joining(40).percent == 40
    assert joining(40).groups(H200, NUM_SMS) == (0, 1, 2, 3, 4, 5)
    assert [len(joining(share).groups(H200, NUM_SMS)) for share in (25, 50, 75)] == [4, 8, 12]


def test_processes_that_join_have_groups_that_those_before_do_not_have() -> None:
    for shares in ((50, 50), (25, 75), (75, 25), (40, 30), (50, 25, 25)):
        joined = [joining(share, shares[:index]).groups(H200, NUM_SMS) for index, share in enumerate(shares)]
        assert sum(shared(one, other) for one, other in itertools.combinations(joined, 2)) <= len(shares) - 1, shares
    one, other = joining(50).groups(H200, NUM_SMS), joining(50, (50,)).groups(H200, NUM_SMS)
    assert not shared(one, other)


def test_any_shares_are_divided() -> None:
    chance = random.Random(3)
    for _ in range(300):
        gpu = SmGroups(chance.randint(1, 20), 8)
        num_sms = gpu.count * 8 + chance.randint(0, 15)
        shares = tuple(chance.randint(1, 100) for _ in range(chance.randint(1, 12)))
        for share, groups in zip(shares, divide(shares, gpu, num_sms), strict=True):
            assert len(set(groups)) == len(groups) >= 1 and set(groups) <= set(range(gpu.count))
            assert len(groups) == 1 or share == 100 or len(groups) * 8 <= num_sms * share / 100
