"""Find stop strings in text that arrives in parts."""

from __future__ import annotations


class StopPatterns:
    """The stop strings of a request, made ready once for all its choices, longest first."""

    def __init__(self, stops: list[str]) -> None:
        self.patterns = [(stop, _borders(stop)) for stop in sorted(stops, key=len, reverse=True)]


class StopStrings:
    """Passes the text of one choice on until one of the stop strings is complete.

    Text that may be the start of a stop string is held back. The string that is complete first wins, however the
    text is cut into parts; of two complete at one character, the longer one. Knuth, Morris and Pratt, 1977: one step
    per character and string.
    """

    def __init__(self, stops: StopPatterns) -> None:
        self._matchers = [_Matcher(pattern, borders) for pattern, borders in stops.patterns]
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Return the text that may be shown now, and the stop string if one is complete, after which nothing is."""
        text = self._held + text
        for place in range(len(self._held), len(text)):
            for matcher in self._matchers:
                if matcher.step(text[place]):
                    self._held = ""
                    return text[: place + 1 - len(matcher.pattern)], matcher.pattern
        kept = max((matcher.matched for matcher in self._matchers), default=0)
        shown = text[: len(text) - kept]
        self._held = text[len(shown) :]
        return shown, None

    def flush(self) -> str:
        """Return the text held back, once no more comes."""
        held, self._held = self._held, ""
        return held


class _Matcher:
    def __init__(self, pattern: str, borders: list[int]) -> None:
        self.pattern = pattern
        self.matched = 0
        self._borders = borders

    def step(self, char: str) -> bool:
        while self.matched and self.pattern[self.matched] != char:
            self.matched = self._borders[self.matched - 1]
        self.matched += self.pattern[self.matched] == char
        return self.matched == len(self.pattern)


def _borders(pattern: str) -> list[int]:
    """Return for every prefix the length of its longest proper prefix that is also its suffix."""
    borders = [0]
    for char in pattern[1:]:
        border = borders[-1]
        while border and pattern[border] != char:
            border = borders[border - 1]
        borders.append(border + (pattern[border] == char))
    return borders
