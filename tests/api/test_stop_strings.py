from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.api.stop_strings import StopPatterns, StopStrings

STOPS = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=4)


def run(stops: list[str], pieces: list[str]) -> tuple[list[str], str | None]:
    found = StopStrings(StopPatterns(stops))
    shown = []
    for piece in pieces:
        text, hit = found.push(piece)
        shown.append(text)
        if hit is not None:
            return shown, hit
    return [*shown, found.flush()], None


def first_complete(stops: list[str], text: str) -> tuple[str, str | None]:
    """The same by trying every prefix."""
    for end in range(len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


@settings(max_examples=300, deadline=None)
@given(STOPS, st.lists(st.text("abc", max_size=4), max_size=8))
def test_text_is_cut_at_the_first_complete_stop_string_however_it_is_cut_into_pieces(
    stops: list[str], pieces: list[str]
) -> None:
    shown, hit = run(stops, pieces)
    assert ("".join(shown), hit) == first_complete(stops, "".join(pieces))


@settings(max_examples=300, deadline=None)
@given(STOPS, st.lists(st.text("abc", max_size=4), max_size=8))
def test_nothing_that_may_begin_a_stop_string_is_shown_and_nothing_else_is_kept(
    stops: list[str], pieces: list[str]
) -> None:
    found, text, shown = StopStrings(StopPatterns(stops)), "", ""
    for piece in pieces:
        text += piece
        more, hit = found.push(piece)
        if hit is not None:
            return
        shown += more
        starts = [stop[:size] for stop in stops for size in range(len(stop))]
        kept = max(len(start) for start in starts if text.endswith(start))
        assert shown == text[: len(text) - kept]


def test_a_stop_string_over_three_pieces_is_never_seen() -> None:
    assert run(["END"], ["a E", "N", "D b"]) == (["a ", "", ""], "END")


def test_what_only_looked_like_a_stop_string_comes_later() -> None:
    assert run(["END"], ["a E", "N", "C"]) == (["a ", "", "ENC", ""], None)


def test_text_that_ends_within_a_stop_string_is_complete() -> None:
    assert run(["END"], ["a EN"]) == (["a ", "EN"], None)
