"""Write a model folder with random weights, for tests and benchmarks.

python scripts/make_random_model.py --out DIR [--family qwen3 --hidden 768 ...]
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import tandem
from tandem.checkpoint.weight_files import INDEX
from tandem.models.model_config import DTYPES

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
DEMO_MODEL = Path(tandem.__file__).parent / "demo_model"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@dataclass(frozen=True, slots=True)
class RandomModel:
    """The shape of a model; a tiny one by default."""

    family: str = "qwen3"
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    intermediate: int = 512
    vocab: int = 300
    max_positions: int = 4096
    tied: bool = True
    dtype: str = "float32"
    shards: int = 1
    seed: int = 0
    eos_token_id: int | None = None

    def config(self) -> dict[str, object]:
        """Return the contents of its `config.json`."""
        return {
            "architectures": [ARCHITECTURES[self.family]],
            "model_type": self.family,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "sliding_window": None,
            "tie_word_embeddings": self.tied,
            "torch_dtype": self.dtype,
            "bos_token_id": None,
            "eos_token_id": self.eos_token_id,
        }

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield its weights by name: random values, scaled so that logits are of order one."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int, scale: float) -> Tensor:
            return (torch.randn(shape, generator=generator) * scale).to(DTYPES[self.dtype])

        def norm(size: int) -> Tensor:
            return 1 + normal(size, scale=0.1)

        def linear(name: str, outputs: int, inputs: int, bias: bool = False) -> Iterator[tuple[str, Tensor]]:
            yield f"{name}.weight", normal(outputs, inputs, scale=inputs**-0.5)
            if bias:
                yield f"{name}.bias", normal(outputs, scale=0.1)

        yield from linear("model.embed_tokens", self.vocab, self.hidden)
        has_bias = self.family == "qwen2"
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
            yield f"{prefix}.input_layernorm.weight", norm(self.hidden)
            yield f"{prefix}.post_attention_layernorm.weight", norm(self.hidden)
            yield from linear(f"{prefix}.self_attn.q_proj", queries, self.hidden, has_bias)
            yield from linear(f"{prefix}.self_attn.k_proj", keys, self.hidden, has_bias)
            yield from linear(f"{prefix}.self_attn.v_proj", keys, self.hidden, has_bias)
            yield from linear(f"{prefix}.self_attn.o_proj", self.hidden, queries)
            if self.family == "qwen3":
                yield f"{prefix}.self_attn.q_norm.weight", norm(self.head_dim)
                yield f"{prefix}.self_attn.k_norm.weight", norm(self.head_dim)
            yield from linear(f"{prefix}.mlp.gate_proj", self.intermediate, self.hidden)
            yield from linear(f"{prefix}.mlp.up_proj", self.intermediate, self.hidden)
            yield from linear(f"{prefix}.mlp.down_proj", self.hidden, self.intermediate)
        yield "model.norm.weight", norm(self.hidden)
        if not self.tied:
            yield from linear("lm_head", self.vocab, self.hidden)


def write_random_model(folder: str | Path, model: RandomModel, tokenizer: str | Path | None = None) -> Path:
    """Write config, weights and, if given, the tokenizer of the folder `tokenizer`; return `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.config(), indent=2))
    tensors = dict(model.tensors())
    if model.shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        _write_shards(folder, tensors, model.shards)
    for file in [Path(tokenizer) / name for name in TOKENIZER_FILES] if tokenizer else []:
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    return folder


def _write_shards(folder: Path, tensors: dict[str, Tensor], shards: int) -> None:
    weight_map: dict[str, str] = {}
    names = list(tensors)
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        own = {name: tensors[name] for name in names[shard::shards]}
        save_file(own, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(own, file))
    total = sum(tensor.nbytes for tensor in tensors.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))


def main() -> None:
    defaults = RandomModel()
    parser = argparse.ArgumentParser(description="Write a Hugging Face model folder with random weights.")
    parser.add_argument("--out", required=True, type=Path, help="the folder to write")
    parser.add_argument("--family", choices=sorted(ARCHITECTURES), default=defaults.family)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default=defaults.dtype)
    parser.add_argument("--untied", action="store_true", help="give the head weights of its own")
    parser.add_argument("--tokenizer", type=Path, default=DEMO_MODEL, help="folder to copy the tokenizer from")
    parser.add_argument("--eos-token-id", type=int, default=None)
    for name in ("hidden", "layers", "heads", "kv_heads", "head_dim", "intermediate", "vocab"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(defaults, name))
    for name in ("max_positions", "shards", "seed"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(defaults, name))
    options = vars(parser.parse_args())
    out, tokenizer, untied = options.pop("out"), options.pop("tokenizer"), options.pop("untied")
    print(write_random_model(out, RandomModel(tied=not untied, **options), tokenizer))


if __name__ == "__main__":
    main()
