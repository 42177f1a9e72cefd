from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tandem.checkpoint.weight_files import weight_files
from tandem.models.model_config import load_config

SCRIPT = Path(__file__).parents[1] / "scripts" / "make_random_model.py"


def test_the_script_writes_a_folder_of_the_requested_shape(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    options = "--family qwen2 --hidden 32 --layers 1 --heads 2 --kv-heads 1 --head-dim 16 --intermediate 40"
    options += " --vocab 50 --dtype bfloat16 --shards 2 --eos-token-id 7"
    command = [sys.executable, str(SCRIPT), *options.split(), "--out", str(tmp_path / "model")]
    subprocess.run([*command, "--tokenizer", str(tokenizer)], check=True, timeout=120)
    config = load_config(tmp_path / "model")
    assert (config.architecture, config.hidden_size, config.vocab_size) == ("Qwen2ForCausalLM", 32, 50)
    assert (config.dtype, config.eos_token_ids, config.tie_word_embeddings) == ("bfloat16", (7,), True)
    assert len(weight_files(tmp_path / "model")) == 2
    assert json.loads((tmp_path / "model" / "tokenizer.json").read_text()) == {}
