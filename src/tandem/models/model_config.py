"""The configuration of a model, read from the `config.json` of a Hugging Face folder and checked.

Both spellings are understood: that of transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and that of
transformers 5 (`rope_parameters`, `dtype`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import torch

from tandem.errors import ModelError

RopeType = Literal["default", "linear", "llama3"]

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class _Architecture(NamedTuple):
    """The defaults of an architecture's configuration class, for what `config.json` leaves out."""

    max_positions: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    sliding_window: int | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    may_bias_attention: bool = False
    may_bias_mlp: bool = False
    window_is_optional: bool = False
    """The window counts only with `use_sliding_window`."""


ARCHITECTURES: dict[str, _Architecture] = {
    "LlamaForCausalLM": _Architecture(2048, may_bias_attention=True, may_bias_mlp=True),
    "MistralForCausalLM": _Architecture(131072, num_kv_heads=8, sliding_window=4096),
    "Qwen2ForCausalLM": _Architecture(32768, qkv_bias=True, window_is_optional=True),
    "Qwen3ForCausalLM": _Architecture(
        32768, head_dim=128, qk_norm=True, may_bias_attention=True, window_is_optional=True
    ),
}


class RopeConfig(msgspec.Struct, frozen=True):
    """Rotary position embedding (Su et al., 2021), and how it is stretched to longer contexts."""

    theta: float = 10000.0
    type: RopeType = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_positions: int = 0


class ModelConfig(msgspec.Struct, frozen=True):
    """A decoder-only transformer of the Llama, Mistral, Qwen2 or Qwen3 family."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    """Bias of the attention's output projection."""
    mlp_bias: bool
    qk_norm: bool
    """Each head of queries and keys is RMS-normalised before the rotation."""
    sliding_window: int | None
    dtype: str
    """The dtype that the weights are meant to be computed in: a key of `DTYPES`."""
    eos_token_ids: tuple[int, ...]

    @property
    def max_context(self) -> int:
        """The longest context that this model serves. Attention here is always full, which equals a sliding window
        up to the length of that window."""
        if self.sliding_window is None:
            return self.max_positions
        return min(self.max_positions, self.sliding_window)

    def check_max_model_len(self, max_model_len: int) -> None:
        """Raise `ModelError` for a context longer than the model, or full attention over it, can serve."""
        if self.sliding_window is not None and max_model_len > self.sliding_window:
            raise ModelError(
                f"the model attends within a sliding window of {self.sliding_window} tokens, which is served only "
                f"up to that length; got --max-model-len {max_model_len}, use at most {self.max_context}"
            )
        if max_model_len > self.max_positions:
            raise ModelError(
                f"the model has {self.max_positions} positions; got --max-model-len {max_model_len}, "
                f"use at most {self.max_context}"
            )

    def torch_dtype(self, name: str = "auto") -> torch.dtype:
        """Return the dtype called `name`; for `auto` the model's own. Raises `ModelError`."""
        wanted = self.dtype if name == "auto" else name
        if wanted not in DTYPES:
            raise ModelError(f"the dtype must be auto, {', '.join(DTYPES)}; got {wanted}")
        return DTYPES[wanted]


def load_config(path: str | Path) -> ModelConfig:
    """Load the configuration in the folder `path`. Raises `ModelError`."""
    folder = Path(path)
    if not folder.is_dir():
        raise ModelError(f"no model folder at {folder}")
    if not (folder / "config.json").is_file():
        raise ModelError(f"no config.json in {folder}; a Hugging Face model folder was expected")
    generation = folder / "generation_config.json"
    return parse_config(_read_json(folder / "config.json"), _read_json(generation) if generation.is_file() else {})


def parse_config(raw: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
    """Parse the contents of `config.json` and `generation_config.json`.

    Raises `ModelError` for what is missing, malformed or not supported.
    """
    name, defaults = _architecture(raw)
    keys = _Keys(raw)
    _refuse_unsupported(raw)
    num_heads = keys.integer("num_attention_heads")
    hidden_size = keys.integer("hidden_size")
    max_positions = keys.integer("max_position_embeddings", defaults.max_positions)
    attention_bias = defaults.may_bias_attention and keys.flag("attention_bias")
    config = ModelConfig(
        architecture=name,
        vocab_size=keys.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=keys.integer("intermediate_size"),
        num_layers=keys.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=keys.integer("num_key_value_heads", defaults.num_kv_heads or num_heads),
        head_dim=_head_dim(keys, defaults, hidden_size, num_heads),
        max_positions=max_positions,
        rms_norm_eps=keys.number("rms_norm_eps", 1e-6),
        rope=_rope(raw, max_positions),
        tie_word_embeddings=keys.flag("tie_word_embeddings"),
        qkv_bias=defaults.qkv_bias or attention_bias,
        output_bias=attention_bias,
        mlp_bias=defaults.may_bias_mlp and keys.flag("mlp_bias"),
        qk_norm=defaults.qk_norm,
        sliding_window=_sliding_window(keys, defaults),
        dtype=_dtype(raw),
        eos_token_ids=_eos_token_ids(raw, generation or {}),
    )
    if config.num_heads % config.num_kv_heads:
        raise ModelError(
            f"config.json: num_attention_heads must be a multiple of num_key_value_heads; "
            f"got {config.num_heads} and {config.num_kv_heads}"
        )
    if config.head_dim % 2:
        raise ModelError(f"config.json: head_dim must be even for rotary embeddings; got {config.head_dim}")
    return config


class _Keys:
    """Typed access to `config.json`."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self._raw = raw

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ModelError(f"config.json: {key} must be a positive integer; got {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise ModelError(f"config.json: {key} must be a positive number; got {value!r}")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self._get(key, False)
        if not isinstance(value, bool):
            raise ModelError(f"config.json: {key} must be true or false; got {value!r}")
        return value

    def has(self, key: str) -> bool:
        return self._raw.get(key) is not None

    def contains(self, key: str) -> bool:
        """Return whether the key is there at all, null included."""
        return key in self._raw

    def _get(self, key: str, default: object) -> object:
        value = self._raw.get(key)
        if value is None:
            value = default
        if value is None:
            raise ModelError(f"config.json: {key} is missing")
        return value


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise ModelError(f"{path} is not a JSON object: {error}") from error


def _architecture(raw: Mapping[str, Any]) -> tuple[str, _Architecture]:
    named = raw.get("architectures") or []
    for name in named:
        if name in ARCHITECTURES:
            return name, ARCHITECTURES[name]
    got = ", ".join(map(str, named)) or f"none (model_type {raw.get('model_type')!r})"
    raise ModelError(f"the architecture must be one of {', '.join(ARCHITECTURES)}; config.json names {got}")


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "an unnamed method")
        raise ModelError(f"quantized weights ({method}) are not supported; use a folder of plain weights")
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ModelError(f"config.json: hidden_act must be silu; got {activation!r}")


def _head_dim(keys: _Keys, defaults: _Architecture, hidden_size: int, num_heads: int) -> int:
    if keys.has("head_dim") or (defaults.head_dim and not keys.contains("head_dim")):
        return keys.integer("head_dim", defaults.head_dim)
    if hidden_size % num_heads:
        raise ModelError(
            f"config.json: without head_dim, hidden_size must be a multiple of num_attention_heads; "
            f"got {hidden_size} and {num_heads}"
        )
    return hidden_size // num_heads


def _rope(raw: Mapping[str, Any], max_positions: int) -> RopeConfig:
    parameters = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(parameters, Mapping) or any(isinstance(v, Mapping) for v in parameters.values()):
        raise ModelError("config.json: rope parameters that differ between layers are not supported")
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    keys = _Keys(parameters)
    theta = keys.number("rope_theta", _Keys(raw).number("rope_theta", 10000.0))
    rotated = parameters.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if rotated not in (None, 1, 1.0):
        raise ModelError(f"config.json: partial_rotary_factor must be 1; got {rotated!r}")
    if kind == "default":
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, "linear", keys.number("factor"))
    if kind == "llama3":
        low, high = keys.number("low_freq_factor"), keys.number("high_freq_factor")
        if high <= low:
            raise ModelError(f"config.json: high_freq_factor must be above low_freq_factor; got {high} and {low}")
        original = keys.integer("original_max_position_embeddings", max_positions)
        return RopeConfig(theta, "llama3", keys.number("factor"), low, high, original)
    raise ModelError(f"config.json: the rope type must be default, linear or llama3; got {kind!r}")


def _sliding_window(keys: _Keys, defaults: _Architecture) -> int | None:
    has_window = defaults.sliding_window is not None
    if not (keys.flag("use_sliding_window") if defaults.window_is_optional else has_window):
        return None
    # Mistral's configuration class has a window unless the file says null.
    default = None if keys.contains("sliding_window") else defaults.sliding_window
    return keys.integer("sliding_window", default) if keys.has("sliding_window") or default else None


def _dtype(raw: Mapping[str, Any]) -> str:
    name = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise ModelError(f"config.json: the dtype must be one of {', '.join(DTYPES)}; got {name!r}")
    return name


def _eos_token_ids(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the ids that end a generation. Chat models list more of them in `generation_config.json`."""
    ids: list[int] = []
    for source in (generation, raw):
        value = source.get("eos_token_id")
        for token in value if isinstance(value, list) else [value]:
            if isinstance(token, int) and token not in ids:
                ids.append(token)
    return tuple(ids)
