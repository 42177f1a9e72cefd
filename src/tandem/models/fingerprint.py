"""The fingerprint of a model: equal where one engine can use the keys and values of another."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from tandem.errors import ModelError
from tandem.models.loader import weight_files
from tandem.models.model_config import ModelConfig, load_config

WHOLE_UP_TO = 64 << 20
SAMPLES = 64
SAMPLE_BYTES = 64 << 10

# These do not change the keys and values: the end of generation, the default of the compute dtype, and the longest
# context that the configuration allows.
_IRRELEVANT = frozenset({"eos_token_ids", "dtype", "max_positions"})


def fingerprint(path: str | Path, config: ModelConfig | None = None) -> str:
    """Return a hex SHA-256 over what decides the keys and values that a model computes: its architecture and weights.

    Weights of up to 64 MiB count whole, of larger ones each file's header and 64 samples of 64 KiB spread evenly
    over the file. The dtype of the computation, tensor and pipeline parallelism and block size do not count; how
    the weights are spread over files does.

    Raises `ModelError`.
    """
    config = config or load_config(path)
    digest = hashlib.sha256()
    relevant = {k: v for k, v in msgspec.to_builtins(config).items() if k not in _IRRELEVANT}
    digest.update(msgspec.json.encode(relevant, order="sorted"))
    files = weight_files(path)
    try:
        whole = sum(file.stat().st_size for file in files) <= WHOLE_UP_TO
        for file in files:
            _add_file(digest, file, whole)
    except OSError as error:
        raise ModelError(f"the weights in {path} cannot be read: {error}") from error
    return digest.hexdigest()


def _add_file(digest: hashlib._Hash, file: Path, whole: bool) -> None:
    size = file.stat().st_size
    with file.open("rb") as stream:
        if whole:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
            return
        # safetensors: the header's length as little-endian u64, then the header.
        header = 8 + int.from_bytes(stream.read(8), "little")
        if header > size:
            raise ModelError(f"{file} is not a safetensors file: its header would be longer than the file")
        stream.seek(0)
        digest.update(stream.read(header))
        last = max(size - SAMPLE_BYTES, header)
        for sample in range(SAMPLES):
            stream.seek(header + (last - header) * sample // (SAMPLES - 1))
            digest.update(stream.read(SAMPLE_BYTES))
