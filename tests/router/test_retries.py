"""Which requests are tried again, and how often."""

from __future__ import annotations

import pytest

from tandem.errors import (
    REQUEST_ERRORS,
    Diverged,
    EngineFailed,
    EngineLeft,
    EngineLost,
    KvRetry,
    Overloaded,
    RequestError,
)
from tandem.router.retries import MAX_ATTEMPTS, RETRIED, Retries


def tries(retries: Retries, error: RequestError, *lost: str) -> None:
    retries.add(error, frozenset(lost), at_fault=lost[0] if lost else "e")


def test_errors_that_are_the_requests_own_are_never_retried() -> None:
    own = {code for code, kind in REQUEST_ERRORS.items() if not issubclass(kind, RETRIED)}
    assert own == {
        "internal_error",
        "invalid_request",
        "no_token_left",
        "unavailable",
        "kv_lost",
        "timed_out",
    }


@pytest.mark.parametrize("error", [EngineFailed("broke"), KvRetry("lost"), Overloaded("full"), Diverged("two texts")])
def test_what_another_engine_may_do_better_is_tried_three_times(error: RequestError) -> None:
    retries = Retries(is_there=lambda incarnation: True)
    for _ in range(MAX_ATTEMPTS - 1):
        tries(retries, error)
    with pytest.raises(type(error)):
        tries(retries, error)


def test_a_request_that_engines_died_of_is_tried_once_more_and_not_again() -> None:
    retries = Retries(is_there=lambda incarnation: False)
    tries(retries, EngineLost("died"), "a")
    with pytest.raises(EngineFailed, match="engines were lost in 2 attempts at this request; the last: died too"):
        tries(retries, EngineLost("died too"), "b")


def test_two_engines_that_die_in_one_attempt_count_once() -> None:
    retries = Retries(is_there=lambda incarnation: False)
    tries(retries, EngineLost("both"), "prefill", "decode")
    with pytest.raises(EngineFailed):
        tries(retries, EngineLost("again"), "other")


def test_an_engine_that_came_back_did_not_die_of_the_request() -> None:
    there = {"a"}
    retries = Retries(there.__contains__)
    for _ in range(10):
        tries(retries, EngineLost("the connection broke"), "a")
    there.clear()
    tries(retries, EngineLost("the connection broke"), "a")  # its last break may be its death, those before were none
    with pytest.raises(EngineFailed):
        tries(retries, EngineLost("died"), "b")


def test_engines_that_are_stopped_in_good_order_do_not_count() -> None:
    retries = Retries(is_there=lambda incarnation: False)
    for _ in range(10):
        tries(retries, EngineLeft("rolling restart"))


def test_losses_and_failures_are_counted_apart() -> None:
    retries = Retries(is_there=lambda incarnation: False)
    tries(retries, EngineFailed("broke"))
    tries(retries, EngineLost("died"), "a")
    tries(retries, EngineFailed("broke"))
    with pytest.raises(EngineFailed):
        tries(retries, EngineFailed("broke"))


def test_the_engine_at_fault_is_avoided_unless_nobody_is() -> None:
    retries = Retries(is_there=lambda incarnation: True)
    tries(retries, EngineLost("broke"), "a")
    tries(retries, Diverged("two texts"))
    assert retries.exclude == {"a"}
