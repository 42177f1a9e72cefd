"""Silence of others is noticed at its bound; a pause of the one who listens is nobody's silence."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.wire.silence import Silence

PATIENCE, INTERVAL = 5.0, 1.0


def looking(silence: Silence[str], start: float, stop: float) -> list[str]:
    """What the last of the regular looks finds."""
    found: list[str] = []
    now = start
    while now <= stop:
        found = silence.look(now)
        now += INTERVAL
    return found


def test_nobody_is_silent_who_was_never_heard() -> None:
    assert looking(Silence[str](PATIENCE, INTERVAL), 0, 100) == []


def test_silence_is_noticed_beyond_the_patience_and_not_at_it() -> None:
    silence: Silence[str] = Silence(PATIENCE, INTERVAL)
    silence.heard("a", 0)
    assert looking(silence, 0, PATIENCE) == []
    assert silence.look(PATIENCE + 0.001) == ["a"]
    silence.heard("a", 6.0)
    assert silence.look(6.0) == []


def test_only_the_silent_one_is_told() -> None:
    silence: Silence[str] = Silence(PATIENCE, INTERVAL)
    silence.heard("a", 0)
    silence.heard("b", 3)
    assert looking(silence, 0, 6) == ["a"]


@pytest.mark.parametrize("pause", [2.0, 8.0, 3600.0])
def test_a_pause_of_the_listener_counts_for_nobody(pause: float) -> None:
    silence: Silence[str] = Silence(PATIENCE, INTERVAL)
    silence.heard("a", 0)
    assert looking(silence, 0, 3) == []
    after = 3 + pause
    assert silence.look(after) == []
    assert silence.look(after + 1) == [], "five seconds without the pause: three, and two intervals"
    assert silence.look(after + 2) == ["a"]


@given(st.lists(st.floats(min_value=2 * INTERVAL, max_value=1e4), max_size=8))
def test_who_is_heard_after_every_pause_is_never_lost(pauses: list[float]) -> None:
    silence: Silence[str] = Silence(PATIENCE, INTERVAL)
    now = 0.0
    silence.heard("a", now)
    silence.look(now)
    for pause in pauses:
        now += pause
        assert silence.look(now) == []
        now += INTERVAL
        silence.heard("a", now)
        assert silence.look(now) == []


@given(st.floats(min_value=2 * INTERVAL, max_value=1e6))
def test_who_is_gone_is_noticed_in_bounded_time_after_a_pause(pause: float) -> None:
    silence: Silence[str] = Silence(PATIENCE, INTERVAL)
    silence.heard("a", 0)
    silence.look(0)
    assert looking(silence, pause, pause + PATIENCE + 2 * INTERVAL) == ["a"]
