"""What dies is started anew, later each time, and not for ever."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tandem.restart_policy import GiveUp, RestartAt, RestartPolicy

WITHIN = 300.0


def test_the_first_death_is_an_accident() -> None:
    assert RestartPolicy().died(7.0) == RestartAt(7.0)


def test_each_further_one_waits_twice_as_long_and_the_sixth_is_the_last() -> None:
    policy = RestartPolicy(most=5, within=WITHIN, first_delay=1.0)
    assert [policy.died(100.0) for _ in range(5)] == [RestartAt(100.0 + delay) for delay in (0, 1, 2, 4, 8)]
    assert policy.died(101.0) == GiveUp(6, 1.0)


def test_the_wait_has_an_upper_bound() -> None:
    policy = RestartPolicy(most=50, longest_delay=30.0)
    assert [policy.died(0.0) for _ in range(20)][-1] == RestartAt(30.0)


def test_deaths_are_forgotten_at_the_end_of_the_time_and_not_before() -> None:
    policy = RestartPolicy(most=1, within=WITHIN)
    policy.died(0.0)
    assert policy.died(WITHIN - 0.001) == GiveUp(2, WITHIN - 0.001)
    policy = RestartPolicy(most=1, within=WITHIN)
    policy.died(0.0)
    assert policy.died(WITHIN) == RestartAt(WITHIN)


@given(st.lists(st.floats(min_value=0, max_value=200), min_size=1, max_size=60), st.integers(1, 6))
def test_there_are_never_more_restarts_in_the_time_than_allowed(gaps: list[float], most: int) -> None:
    policy, now, restarts = RestartPolicy(most=most, within=WITHIN), 0.0, []
    for gap in gaps:
        now += gap
        match policy.died(now):
            case RestartAt(time=time):
                assert time >= now
                restarts.append(now)
                now = time
            case GiveUp(deaths=deaths, seconds=seconds):
                assert deaths == most + 1
                assert 0 <= seconds < WITHIN
                break
    assert all(len([one for one in restarts if start <= one < start + WITHIN]) <= most for start in restarts)
