import pytest

from simulator.swap_copies import SwapCopies
from simulator.timeline import Timeline


def test_copies_take_their_bytes_and_a_worker_makes_one_at_a_time() -> None:
    timeline, ended_at_s = Timeline(), list[float]()
    copies = SwapCopies(timeline, bytes_per_s=100.0)
    for num_bytes in (50, 100):
        copies.copy(num_bytes, lambda: ended_at_s.append(timeline.now_s))
    timeline.at(5.0, lambda: copies.copy(10, lambda: ended_at_s.append(timeline.now_s)))
    timeline.run()
    assert ended_at_s == pytest.approx([0.5, 1.5, 5.1]) and copies.copied_bytes == 160
