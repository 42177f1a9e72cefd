"""The model's tokenizer: text to token ids, and the bytes of each id."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import tokenizers

from tandem.errors import ModelError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_METASPACE = "\u2581"


class Tokenizer:
    """A Hugging Face tokenizer, as the API needs it.

    Attributes:
        vocab_size: ids are below this: rows of the model's embedding, if config.json tells, else of the tokenizer.
        special_ids: tokens that are never text, such as end-of-sequence.
        is_byte_level: whether each token stands for the same bytes wherever it is.
        longest_token: characters of text that one token stands for at most.
        normalizes: whether texts are changed before they are cut into tokens.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, vocab_size: int | None = None) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        added = tokenizer.get_added_tokens_decoder()
        kinds = _decoder_kinds(tokenizer)
        self._tokenizer = tokenizer
        self._bytes: dict[int, bytes] = {}
        self._byte_fallback = "ByteFallback" in kinds
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.is_byte_level = "ByteLevel" in kinds and kinds <= {"ByteLevel", "Fuse"}
        vocabulary = tokenizer.get_vocab()
        self.longest_token = max(map(len, vocabulary), default=1)  # byte-level tokens have a character for each byte
        self.normalizes = tokenizer.normalizer is not None
        self.vocab_size = vocab_size or max(vocabulary.values(), default=-1) + 1

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the token ids of `text`, begun (and ended) as the model wants it if `add_special_tokens`."""
        # of the encode methods only this one leaves the interpreter to other threads for nearly all of its time
        return list(self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)

    def encode_last(self, text: str, count: int, *, add_special_tokens: bool) -> tuple[list[int], int]:
        """Return the last `count` token ids of `text`, with special ones around them, and how many `text` has."""
        encoding = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0]
        room = max(0, count - (self._tokenizer.num_special_tokens_to_add(False) if add_special_tokens else 0))
        total = len(encoding.ids)
        encoding.truncate(room, direction="left")
        found = self._tokenizer.post_process(encoding, add_special_tokens=add_special_tokens)
        return list(found.ids)[-count:] if count else [], total

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def pieces(self, token_ids: list[int]) -> list[str]:
        """Return each token as the vocabulary writes it; "" for an id that is no token."""
        return [self._tokenizer.id_to_token(one) or "" for one in token_ids]

    def knows(self, token_id: int) -> bool:
        return self._tokenizer.id_to_token(token_id) is not None

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token stands for; none for an id that is no token. Special tokens: their name."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._find_bytes(token_id)
        return known

    def token_text(self, token_id: int) -> str:
        """Return a token for people: its text, or `bytes:\\xe2\\x80` as OpenAI writes a part of a character."""
        raw = self.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def ends_whole(self, token_ids: list[int]) -> bool:
        """Return whether these tokens are known not to end within a character: byte-fallback tokens tell."""
        if not self._byte_fallback:
            return False
        run = bytearray()
        for token_id in reversed(token_ids):
            byte = self._fallback_byte(token_id)
            if byte is None:
                break
            run.append(byte)
        try:
            run[::-1].decode()
        except UnicodeDecodeError:
            return False
        return True

    def _fallback_byte(self, token_id: int) -> int | None:
        token = self._tokenizer.id_to_token(token_id) if self._byte_fallback else None
        byte = _BYTE_TOKEN.fullmatch(token) if token is not None else None
        return int(byte[1], 16) if byte else None

    def _find_bytes(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self.special_ids:
            return token.encode()
        if self.is_byte_level:
            return bytes(_CHAR_BYTES[char] for char in token) if _CHAR_BYTES.keys() >= set(token) else token.encode()
        byte = self._fallback_byte(token_id)
        return token.replace(_METASPACE, " ").encode() if byte is None else bytes([byte])


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer of a model folder. Raises ModelError."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return Tokenizer(_convert(folder), _vocab_size(folder))
    try:
        return Tokenizer(tokenizers.Tokenizer.from_file(str(file)), _vocab_size(folder))
    except Exception as error:  # the library raises bare Exception
        raise ModelError(f"{file} is not a tokenizer that can be read: {error}") from error


def read_json(file: Path) -> dict[str, Any]:
    """Return a JSON object from a model folder; empty if there is no such file. Raises ModelError."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file} must hold a JSON object; it holds a {type(value).__name__}.")
    return value


def _convert(folder: Path) -> tokenizers.Tokenizer:
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise ModelError(
            f"{folder} has no tokenizer.json, and converting its tokenizer needs transformers. "
            "Install transformers, or save the model's tokenizer as tokenizer.json."
        ) from None
    try:
        found = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # whatever a tokenizer's own code raises
        raise ModelError(f"{folder} has no tokenizer that can be loaded: {error}") from error
    backend = getattr(found, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise ModelError(f"{folder} has no tokenizer.json, and {type(found).__name__} cannot be turned into one.")
    return backend


def _vocab_size(folder: Path) -> int | None:
    config = read_json(folder / "config.json")
    text = config.get("text_config")
    size = config.get("vocab_size", text.get("vocab_size") if isinstance(text, dict) else None)
    return size if isinstance(size, int) else None


def _decoder_kinds(tokenizer: tokenizers.Tokenizer) -> set[str]:
    if tokenizer.decoder is None:
        return set()
    state = json.loads(tokenizer.decoder.__getstate__())
    parts = state.get("decoders", [state])
    return {part["type"] for part in parts}


def _char_bytes() -> dict[str, int]:
    """Return the byte of each character of byte-level BPE.

    Printable Latin-1 stands for itself; the other bytes are the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_CHAR_BYTES = _char_bytes()
