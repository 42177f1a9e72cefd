import builtins
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from tandem.api.tokenizer import Tokenizer, load_tokenizer
from tandem.errors import ModelError
from tests.api.conftest import EOS, START, byte_fallback, byte_level, ids, token_id

FALLBACK = Tokenizer(byte_fallback())


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=True)


def test_truncation_and_padding_of_a_tokenizer_file_are_not_followed() -> None:
    raw = byte_level()
    raw.enable_truncation(2)
    raw.enable_padding(length=50)
    assert encode(Tokenizer(raw), "hello world hello") == ids("hello world hello")


def test_the_bytes_of_a_texts_tokens_are_the_text(tokenizer: Tokenizer) -> None:
    text = "grüße, 東京 🙂 hello\n"
    assert b"".join(map(tokenizer.token_bytes, ids(text))).decode() == text


def test_added_tokens_stand_for_their_own_characters(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes(ids("<東>")[0]).decode() == "<東>"


def test_a_part_of_a_character_is_written_as_its_bytes(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_text(ids("\x80")[0]) == "bytes:\\xc2"


def test_metaspace_and_byte_tokens_stand_for_space_and_byte() -> None:
    assert FALLBACK.token_bytes(3 + 0xE2) == b"\xe2"
    assert FALLBACK.token_text(token_id(byte_fallback(), "\u2581the")) == " the"


def test_an_id_that_is_no_token_is_no_bytes(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes(10**6) == b""


def test_the_vocabulary_is_as_large_as_the_models_embedding_if_its_config_tells(folder: Path, tmp_path: Path) -> None:
    own = load_tokenizer(folder).vocab_size
    assert own == ids(EOS)[0] + 5
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"vocab_size": own + 10}}))
    assert load_tokenizer(tmp_path).vocab_size == own + 10


def test_a_broken_tokenizer_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json is not a tokenizer"):
        load_tokenizer(tmp_path)


def test_a_model_without_tokenizer_json_needs_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name == "transformers":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModelError, match="Install transformers"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 9])
def test_the_last_tokens_of_a_text_keep_what_begins_it(count: int) -> None:
    made = byte_level()
    start = token_id(made, START)
    made.post_processor = processors.TemplateProcessing(f"{START} $A", None, [(START, start)])
    found = Tokenizer(made)
    text = "xyzzy"
    plain = found.encode(text, add_special_tokens=False)
    assert found.encode_last(text, count, add_special_tokens=False) == (plain[max(0, len(plain) - count) :], len(plain))
    expected = [start, *plain[max(0, len(plain) - count + 1) :]] if count else []
    assert found.encode_last(text, count, add_special_tokens=True) == (expected, len(plain))
