"""Writes a model folder with random weights: `make_random_model.py --out DIR [--family qwen3 --hidden 768 ...]`."""

from __future__ import annotations

import argparse
from pathlib import Path

import tandem
from tandem.models.model_config import DTYPES
from tandem.models.random_model import ARCHITECTURES, RandomModel, write_random_model

DEMO_MODEL = Path(tandem.__file__).parent / "demo_model"


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
