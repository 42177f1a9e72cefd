import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tandem.api.generation_defaults import OPENAIS, GenerationDefaults, load_defaults
from tandem.errors import ModelError
from tandem.wire.sampling import SamplingParams
from tests.api.conftest import Api, FakeBackend, ids, running

QWEN3 = {"do_sample": True, "eos_token_id": [3, 4], "temperature": 0.6, "top_k": 20, "top_p": 0.95}


def write(folder: Path, content: Any) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def serving(folder: Path, tmp_path: Path) -> Iterator[Callable[..., Api]]:
    """Starts an API for a model with this generation_config.json."""
    with ExitStack() as stack:

        def start(content: Any, **options: Any) -> Api:
            shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
            return stack.enter_context(running(FakeBackend(write(tmp_path, content)), **options))

        yield start


def sampling(api: Api) -> SamplingParams:
    return api.backend.requests[-1].sampling


def test_without_the_file_or_with_nothing_in_it_defaults_are_openais(tmp_path: Path) -> None:
    assert load_defaults(tmp_path) == OPENAIS
    assert load_defaults(write(tmp_path, {"do_sample": False, "eos_token_id": 5, "temperature": None})) == OPENAIS


def test_what_the_makers_recommend_is_read(tmp_path: Path) -> None:
    found = load_defaults(write(tmp_path, QWEN3 | {"max_new_tokens": 2048, "repetition_penalty": 1.05, "min_p": 0.01}))
    expected = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.01, "repetition_penalty": 1.05}
    assert found == GenerationDefaults(expected, 2048)


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("temperature", [0, 0.0, 100], [-0.1, 101, "hot", True, [1]]),
        ("top_p", [0.01, 1], [0, 1.1, "x"]),
        ("top_k", [0, 1, 2**31 - 1], [-2, 2**31, 1.5]),
        ("min_p", [0, 1], [-0.1, 1.1]),
        ("repetition_penalty", [0.01, 100], [0, 101]),
    ],
)
def test_a_value_out_of_range_is_logged_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, field: str, good: list[Any], bad: list[Any]
) -> None:
    for value in good:
        assert load_defaults(write(tmp_path, {field: value})).sampling == {field: value}
    for value in bad:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert load_defaults(write(tmp_path, QWEN3 | {field: value})).sampling.get(field) is None
        assert field in caplog.text


@pytest.mark.parametrize("value", [0, -1, 1.5, "x", 2**31])
def test_a_length_that_cannot_be_is_left_out(tmp_path: Path, value: Any) -> None:
    assert load_defaults(write(tmp_path, {"max_new_tokens": value})) == OPENAIS
    assert load_defaults(write(tmp_path, {"top_k": -1})).sampling == {"top_k": 0}


def test_a_file_that_is_no_object_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="JSON object"):
        load_defaults(write(tmp_path, []))


@pytest.mark.parametrize("kind", ["router", "engine"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_gets_the_models_sampling_but_for_what_it_says(
    serving: Callable[..., Api], kind: str, stream: bool
) -> None:
    api = serving(QWEN3 | {"max_new_tokens": 7}, kind=kind)
    for send, limit in ((api.complete, 16), (api.chat, 7)):
        send(stream=stream)
        found = sampling(api)
        assert (found.temperature, found.top_p, found.top_k, found.max_tokens) == (0.6, 0.95, 20, limit)
        send(stream=stream, temperature=0, top_k=-1, max_tokens=3, top_p=None)
        found = sampling(api)
        assert (found.temperature, found.top_p, found.top_k, found.max_tokens) == (0, 0.95, 0, 3)


def test_the_models_length_gives_way_where_less_fits(serving: Callable[..., Api]) -> None:
    api = serving({"max_new_tokens": 100_000})
    api.chat()
    prompt = ids("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")
    assert sampling(api).max_tokens == 256 - len(prompt)


def test_the_file_can_be_left_aside(serving: Callable[..., Api]) -> None:
    api = serving(QWEN3 | {"max_new_tokens": 7}, source="tandem")
    api.chat()
    found = sampling(api)
    assert (found.temperature, found.top_p, found.top_k) == (1.0, 1.0, 0)
    assert found.max_tokens > 7


def test_the_log_tells_a_default_of_0_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        load_defaults(write(tmp_path, {"temperature": 0, "top_p": 0.5}))
    assert caplog.messages[-1].endswith("says: temperature 0, top_p 0.5")
