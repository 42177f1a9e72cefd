from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tandem.errors import ModelError
from tandem.models.model_config import RopeConfig, load_config, parse_config

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}
LLAMA3: dict[str, Any] = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def test_what_the_file_leaves_out_is_what_transformers_assumes() -> None:
    from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

    sizes = {k: v for k, v in BASE.items() if k != "architectures"}
    for kind, name in (
        (LlamaConfig, "LlamaForCausalLM"),
        (MistralConfig, "MistralForCausalLM"),
        (Qwen2Config, "Qwen2ForCausalLM"),
        (Qwen3Config, "Qwen3ForCausalLM"),
    ):
        heads = {"num_key_value_heads": 2} if name.startswith("Qwen") else {"num_attention_heads": 8}
        theirs: Any = kind(**{**sizes, **heads})
        ours = parse_config({**BASE, **heads, "architectures": [name]})
        head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
        assert ours.head_dim == head_dim
        assert ours.num_kv_heads == theirs.num_key_value_heads
        assert ours.max_positions == theirs.max_position_embeddings
        assert ours.rms_norm_eps == theirs.rms_norm_eps
        assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
        assert ours.tie_word_embeddings == theirs.tie_word_embeddings
        assert ours.sliding_window == getattr(theirs, "sliding_window", None)


def test_old_and_new_keys_say_the_same() -> None:
    old = {
        **BASE,
        "rope_theta": 5e5,
        "rope_scaling": {"rope_type": "llama3", "original_max_position_embeddings": 64, **LLAMA3},
        "torch_dtype": "bfloat16",
    }
    new = {
        **BASE,
        "rope_parameters": {
            "rope_theta": 5e5,
            "rope_type": "llama3",
            "original_max_position_embeddings": 64,
            **LLAMA3,
        },
        "dtype": "bfloat16",
    }
    assert parse_config(old) == parse_config(new)
    assert parse_config(new).rope == RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 64)
    assert parse_config(new).torch_dtype() == torch.bfloat16
    assert parse_config(new).torch_dtype("float32") == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "LlamaForCausalLM, .*Qwen3ForCausalLM; .* GPT2LMHeadModel"),
        ({"architectures": None, "model_type": "t5"}, "model_type 't5'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "default, linear or llama3; got 'yarn'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "differ between layers"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}}, "above low_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1; got 0.5"),
        ({"hidden_size": "64"}, "hidden_size must be a positive integer; got '64'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer; got 0"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"num_key_value_heads": 3}, "a multiple of num_key_value_heads; got 4 and 3"),
        ({"hidden_size": 66}, "a multiple of num_attention_heads; got 66 and 4"),
        ({"head_dim": 15}, "head_dim must be even"),
        ({"rms_norm_eps": -1}, "rms_norm_eps must be a positive number; got -1"),
        ({"attention_bias": "yes"}, "attention_bias must be true or false; got 'yes'"),
        ({"hidden_act": "gelu"}, "hidden_act must be silu; got 'gelu'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized weights \\(awq\\)"),
        ({"torch_dtype": "float8"}, "got 'float8'"),
    ],
)
def test_what_cannot_be_served_is_refused_in_words(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        parse_config({**BASE, **changes})


def test_a_sliding_window_is_served_up_to_its_length() -> None:
    config = parse_config({**BASE, "architectures": ["MistralForCausalLM"], "num_key_value_heads": 2})
    assert config.max_context == 4096
    config.check_max_model_len(4096)
    with pytest.raises(ModelError, match=r"sliding window of 4096 tokens.* 5000, use at most 4096"):
        config.check_max_model_len(5000)


def test_a_window_that_is_null_or_switched_off_does_not_count() -> None:
    mistral = {**BASE, "architectures": ["MistralForCausalLM"], "num_key_value_heads": 2, "sliding_window": None}
    qwen = {**BASE, "architectures": ["Qwen2ForCausalLM"], "sliding_window": 16, "use_sliding_window": False}
    assert parse_config(mistral).sliding_window is None
    assert parse_config(qwen).sliding_window is None
    assert parse_config({**qwen, "use_sliding_window": True}).sliding_window == 16


def test_a_context_beyond_the_positions_is_refused() -> None:
    config = parse_config({**BASE, "max_position_embeddings": 128})
    with pytest.raises(ModelError, match="128 positions; got --max-model-len 129, use at most 128"):
        config.check_max_model_len(129)


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ModelError, match="auto, bfloat16, float16, float32; got int8"):
        parse_config(BASE).torch_dtype("int8")


def test_the_ids_that_end_a_generation_come_from_both_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**BASE, "eos_token_id": 2}))
    assert load_config(tmp_path).eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2, 9]}))
    assert load_config(tmp_path).eos_token_ids == (7, 2, 9)


def test_a_folder_without_a_readable_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model folder"):
        load_config(tmp_path / "absent")
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ModelError, match="not a JSON object"):
        load_config(tmp_path)
