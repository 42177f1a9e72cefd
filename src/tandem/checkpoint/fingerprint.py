"""The fingerprint of a model: what decides the keys and values that it computes, every byte of its weights included.

Another engine comes to the same fingerprint of the same Hugging Face folder by this code alone: it reads `config.json`
as it is, hashes the safetensors files, and needs neither torch nor a model class.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tandem.checkpoint.digest_cache import DigestCache, FileState, default_folder
from tandem.checkpoint.weight_files import weight_files
from tandem.errors import ModelError

MAX_THREADS = 16
"""Files that are read at a time; each thread needs a core to be of use."""

_TRIES = 3

# These do not change the keys and values: the end of generation, the default of the compute dtype, and who wrote it.
_IRRELEVANT = frozenset(
    {
        *("eos_token_id", "bos_token_id", "pad_token_id", "torch_dtype", "dtype", "use_cache"),
        *("transformers_version", "_name_or_path"),
    }
)
_BLOB = re.compile(r"[0-9a-f]{64}")


def sketch(path: str | Path) -> str:
    """Return a hex SHA-256 over the configuration and the sizes of the weight files: what is known at once.

    Of two folders with one fingerprint it is the same. Raises `ModelError`.
    """
    sizes = sorted(_state(file).size for file in weight_files(path))
    return _sha256_of(_relevant_config(path), sizes)


def fingerprint(path: str | Path, cache: DigestCache | None = None) -> str:
    """Return a hex SHA-256 over the configuration and all bytes of the weights. Takes as long as reading them does.

    Files that were read before, and those of a hub's cache whose name is their digest, are not read. The dtype of
    the computation, the longest context, tensor and pipeline parallelism and block size do not count; how the weights
    are spread over files does, their names do not.

    Args:
        cache: of the digests of files; by default the user's own.

    Raises:
        ModelError: the folder or a file cannot be read, or a file changes while it is read.
    """
    files = weight_files(path)
    known = DigestCache(default_folder()) if cache is None else cache
    threads = min(len(files), len(os.sched_getaffinity(0)), MAX_THREADS)
    with ThreadPoolExecutor(threads, thread_name_prefix="digest") as pool:
        digests = sorted(pool.map(lambda file: file_digest(file, known), files))
    return _sha256_of(_relevant_config(path), digests)


def fingerprint_in_background(path: str | Path) -> Future[str]:
    """Compute the fingerprint in a thread that does not keep the process alive."""
    future: Future[str] = Future()

    def work() -> None:
        try:
            future.set_result(fingerprint(path))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name="fingerprint", daemon=True).start()
    return future


def file_digest(file: Path, cache: DigestCache) -> str:
    """Return the hex SHA-256 of a file. Raises `ModelError`."""
    target = file.resolve()
    if target.parent.name == "blobs" and _BLOB.fullmatch(target.name):
        return target.name  # a hub's cache: the blob was checked against its name when it was fetched
    for _ in range(_TRIES):
        state = _state(file)
        if (known := cache.get(state)) is not None:
            return known
        with cache.reading(state):
            if (known := cache.get(state)) is not None:  # another process has read it meanwhile
                return known
            began = time.time_ns()
            digest = _read(file)
            if _state(file) == state:
                cache.put(state, digest, began)
                return digest
    raise ModelError(f"{file} is being written to: it changed each time it was read; wait until it is complete")


def _read(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error}") from error


def _state(file: Path) -> FileState:
    try:
        return FileState.of(file)
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error}") from error


def _relevant_config(path: str | Path) -> dict[str, Any]:
    """Return what of `config.json` decides the keys and values. An unknown key counts; so does one more spelling."""
    file = Path(path) / "config.json"
    try:
        config = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file} must hold an object; got {type(config).__name__}")
    # The longest context stretches some kinds of rotary embedding; without any of those it is a limit and no more.
    irrelevant = _IRRELEVANT if _stretches_rope(config) else _IRRELEVANT | {"max_position_embeddings"}
    return {key: value for key, value in config.items() if key not in irrelevant}


def _stretches_rope(config: Mapping[str, Any]) -> bool:
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else None
    return bool(kind != "default")


def _sha256_of(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=True).encode()).hexdigest()
