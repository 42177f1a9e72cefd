"""What is refused by its structure, before anything is made of it."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.api import json_structure
from tandem.api.json_structure import MAX_DEPTH, MAX_VALUES, check_structure
from tandem.api.openai import ChatBody, CompletionBody
from tandem.api.parsing import MIN_LIST, parse
from tandem.errors import InvalidRequest

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def refused(body: bytes, max_list: int = 10) -> str:
    with pytest.raises(InvalidRequest) as caught:
        check_structure(body, max_list)
    return str(caught.value)


@settings(max_examples=200, deadline=None)
@given(VALUES)
def test_ordinary_json_is_taken(value: Any) -> None:
    check_structure(json.dumps(value).encode(), 10)
    check_structure(json.dumps(value, ensure_ascii=False, indent=2).encode(errors="surrogatepass"), 10)


def test_nesting_has_an_end() -> None:
    check_structure(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH, 10)
    assert "nested" in refused(b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1))
    assert "nested" in refused(b"[" * 1_000_000)
    assert "nested" in refused(b'{"a":' * 1_000_000)


def test_strings_and_brackets_have_a_limit() -> None:
    check_structure(b"[" + b",".join([b'"x"'] * (MAX_VALUES - 2)) + b"]", 10)
    assert f"{MAX_VALUES} strings" in refused(b"[" + b",".join([b'"x"'] * (MAX_VALUES - 1)) + b"]")


def test_numbers_of_a_list_have_a_limit() -> None:
    check_structure(b"[" + b"1," * 10 + b"1]", 10)
    assert "more than 10 numbers" in refused(b"[" + b"1," * 11 + b"1]")


def test_numbers_of_all_lists_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_structure, "MAX_NUMBERS", 20)
    check_structure(b"[" + b",".join([b"[" + b"1," * 9 + b"1]"] * 2) + b"]", 10)
    assert "or 20 numbers" in refused(b"[" + b",".join([b"[" + b"1," * 9 + b"1]"] * 3) + b"]")


def test_what_is_within_a_string_does_not_count() -> None:
    check_structure(json.dumps("[{,,,,,,,,,,,,}" * MAX_VALUES).encode(), 10)
    check_structure(json.dumps('\\"[' * MAX_VALUES).encode(), 10)


def test_a_string_without_end_is_refused_after_one_look_at_it() -> None:
    assert "a string does not end" in refused(b'"' + b'\\"' * 4_000_000)


@pytest.mark.parametrize("kind", [CompletionBody, ChatBody])
def test_deep_json_is_no_valid_body(kind: type[Any]) -> None:
    with pytest.raises(InvalidRequest, match="nested"):
        parse(b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", kind)


def test_a_prompt_has_as_many_ids_as_the_model_takes() -> None:
    size = MIN_LIST + 5
    assert isinstance(parse(json.dumps({"prompt": [1] * size}).encode(), CompletionBody, size).prompt, list)
    with pytest.raises(InvalidRequest, match=f"more than {size} numbers"):
        parse(json.dumps({"prompt": [1] * (size + 2)}).encode(), CompletionBody, size)
