"""The choice of threads follows what steps of a size have lately cost."""

from collections import Counter
from collections.abc import Callable

from sightline_server.engine.threads import PROBE_EVERY, PROBE_SELDOM, SHORT_S, ThreadChooser


def choices(chooser: ThreadChooser, rows: int, cost: Callable[[int], float], steps: int) -> Counter[int]:
    made: Counter[int] = Counter()
    for _ in range(steps):
        threads = chooser.choose(rows)
        made[threads] += 1
        chooser.took(rows, threads, cost(threads))
    return made


def test_short_steps_and_single_cores_get_one() -> None:
    assert choices(ThreadChooser(4), 8, lambda threads: 0.9 * SHORT_S / threads, 20) == {1: 20}
    assert choices(ThreadChooser(1), 1000, lambda threads: 1.0, 20) == {1: 20}


def test_one_row_is_shared_too_where_that_pays() -> None:
    assert choices(ThreadChooser(2), 1, lambda threads: 2 * SHORT_S / threads, 200)[2] > 180
    assert choices(ThreadChooser(2), 1, lambda threads: 2 * SHORT_S * threads, 200)[1] > 180


def test_free_cores_are_used_and_busy_ones_left() -> None:
    assert choices(ThreadChooser(2), 16, lambda threads: 1 / threads, 200)[2] > 180
    assert choices(ThreadChooser(2), 16, lambda threads: float(threads), 200)[1] > 180


def test_it_follows_when_the_machine_changes() -> None:
    chooser = ThreadChooser(2)
    choices(chooser, 16, lambda threads: 1 / threads, 100)
    busy = choices(chooser, 16, lambda threads: 5.0 * threads, 2 * PROBE_EVERY)
    assert busy[1] > PROBE_EVERY
    free = choices(chooser, 16, lambda threads: 1 / threads, 20 * PROBE_EVERY)
    assert free[2] > 10 * PROBE_EVERY


def test_sizes_are_told_apart() -> None:
    chooser = ThreadChooser(2)
    choices(chooser, 512, lambda threads: 1 / threads, 100)
    assert choices(chooser, 16, lambda threads: float(threads), 100)[1] > 80
    assert choices(chooser, 512, lambda threads: 1 / threads, 100)[2] > 80


def test_what_is_slower_again_and_again_is_tried_ever_more_seldom() -> None:
    chooser = ThreadChooser(2)
    first = choices(chooser, 16, lambda threads: 9.0 * threads, 500)[2]
    then = choices(chooser, 16, lambda threads: 9.0 * threads, 4 * PROBE_SELDOM)[2]
    assert first < 15
    assert 1 <= then <= 5
    # It is still tried, so that cores that become free are found.
    assert choices(chooser, 16, lambda threads: 1 / threads, 8 * PROBE_SELDOM)[2] > PROBE_SELDOM
