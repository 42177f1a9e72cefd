"""Trains the bundled demo model from nothing and writes it as a Hugging Face folder.

    python scripts/train_demo_model.py --out src/tandem/demo_model --seed 0

Needs torch, transformers and tokenizers; takes some minutes on one CPU core. One thread, so that the sums are
taken in one order: the same seed, torch build and kind of processor give the same weights.
"""

import argparse
import json
import math
import random
import time
from collections import Counter
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from tandem.demo_questions import KINDS, Question, long_questions, questions

PAD, START, END, TEXT_END = "<|pad|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"
SPECIALS = [TEXT_END, START, END, PAD]
MAX_LENGTH = 2048
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
EAGER_UP_TO = 160
IGNORED = -100  # the label that cross-entropy skips


def build_tokenizer() -> Tokenizer:
    """One token per byte, plus the special tokens; so it round-trips any text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


def build_config(tokenizer: Tokenizer) -> dict[str, object]:
    """The contents of config.json, in the spelling that every transformers release since 4.51 reads."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": MAX_LENGTH,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": 4,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.token_to_id(END),
        "pad_token_id": tokenizer.token_to_id(PAD),
        "torch_dtype": "float32",
    }


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def write_folder(out: Path, model: Qwen3ForCausalLM, tokenizer: Tokenizer, config: dict[str, object]) -> None:
    """Weights by transformers; the JSON files by hand, so that their spelling does not move with its releases."""
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save(str(out / "tokenizer.json"))
    write_json(out / "config.json", config)
    ends = {"eos_token": END, "pad_token": PAD}
    write_json(out / "special_tokens_map.json", ends)
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": MAX_LENGTH,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
            **ends,
        },
    )
    ids = {"eos_token_id": config["eos_token_id"], "pad_token_id": config["pad_token_id"]}
    write_json(out / "generation_config.json", {"do_sample": False, **ids})


def chat_prompt(question: Question) -> str:
    return f"{START}user\n{question.prompt}{END}\n{START}assistant\n"


def encode(tokenizer: Tokenizer, batch: list[Question]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, both [len(batch), longest]; only the answers and their end carry a label."""
    prompts = tokenizer.encode_batch_fast([chat_prompt(question) for question in batch])
    answers = tokenizer.encode_batch_fast([question.answer + END for question in batch])
    longest = max(len(p.ids) + len(a.ids) for p, a in zip(prompts, answers, strict=True))
    pad = tokenizer.token_to_id(PAD)
    assert pad is not None
    ids = torch.full((len(batch), longest), pad)
    labels = torch.full((len(batch), longest), IGNORED)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt.ids) + len(answer.ids)
        ids[row, :end] = torch.tensor(prompt.ids + answer.ids)
        labels[row, len(prompt.ids) : end] = torch.tensor(answer.ids)
    return ids, labels


def training_batch(step: int, steps: int, seed: int, tokens: int) -> list[Question]:
    """About `tokens` tokens of one size class; lists grow from at most 6 entries to 85 as training goes on."""
    rng = random.Random(f"{seed}/{step}")
    progress = step / steps
    draw = seed * 1_000_003 + step
    if progress > 0.3 and rng.random() < 0.45:
        most = rng.choice([30, 60, 85])
        count = max(4, tokens // (most * 6 + 50))
        return long_questions(count, draw, held_out=False, min_entries=most - 25, max_entries=most)
    most = 6 if progress < 0.1 else rng.choice([4, 8, 16])
    count = max(8, tokens // (most * 6 + 50))
    return questions(count, draw, held_out=False, max_entries=most)


def learning_rate(step: int, steps: int) -> float:
    """The share of the peak rate: linear warm-up, then a cosine to zero."""
    warm = 50
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def build_optimizers(model: Qwen3ForCausalLM, peak: float) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al., 2024) for the matrices inside the layers, AdamW for the embedding and the norms."""
    inside = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    outside = [p for name, p in model.named_parameters() if p.dim() == 1 or "embed" in name]
    return [
        torch.optim.Muon(inside, lr=peak, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(outside, lr=peak / 4, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def answer_loss(model: Qwen3ForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each labelled token, [labelled]. Eager attention is the faster one for short rows."""
    model.set_attn_implementation("eager" if ids.shape[1] <= EAGER_UP_TO else "sdpa")
    with torch.autocast("cpu", torch.bfloat16):
        states = model.model(input_ids=ids).last_hidden_state[:, :-1]
    wanted = labels[:, 1:]
    logits = model.lm_head(states[wanted != IGNORED].float())
    return torch.nn.functional.cross_entropy(logits, wanted[wanted != IGNORED], reduction="none")


def train(model: Qwen3ForCausalLM, tokenizer: Tokenizer, seed: int, steps: int, peak: float, tokens: int) -> None:
    optimizers = build_optimizers(model, peak)
    schedules = [LambdaLR(o, lambda step: learning_rate(step, steps)) for o in optimizers]
    model.train()
    started, seen = time.perf_counter(), 0
    for step in range(steps):
        batch = training_batch(step, steps, seed, tokens)
        ids, labels = encode(tokenizer, batch)
        losses = answer_loss(model, ids, labels)
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad(set_to_none=True)
        seen += ids.numel()
        if step % 50 == 0 or step == steps - 1:
            report(step, losses, labels, batch, seen, time.perf_counter() - started)


def report(
    step: int, losses: torch.Tensor, labels: torch.Tensor, batch: list[Question], seen: int, seconds: float
) -> None:
    """Prints, for each kind in the batch, the mean loss of its answer tokens."""
    rows = (labels[:, 1:] != IGNORED).nonzero()[:, 0]
    kinds = [batch[row].kind for row in rows]
    of_kind = {kind: losses.detach()[[kind == k for k in kinds]].mean().item() for kind in KINDS}
    line = " ".join(f"{kind} {loss:.4f}" for kind, loss in of_kind.items())
    print(
        f"step {step:5} {seconds:4.0f} s {seen / seconds:6.0f} tok/s length {labels.shape[1]:3} {line}",
        flush=True,
    )


@torch.inference_mode()
def accuracy(out: Path, asked: list[Question], dtype: torch.dtype) -> dict[str, float]:
    """Share of exactly right greedy answers per kind, asked of the folder as written."""
    model = AutoModelForCausalLM.from_pretrained(out, dtype=dtype).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out, padding_side="left")
    right, total = Counter[str](), Counter[str]()
    in_order = sorted(asked, key=lambda question: len(question.prompt))
    for first in range(0, len(in_order), 128):
        batch = in_order[first : first + 128]
        inputs = tokenizer([chat_prompt(q) for q in batch], return_tensors="pt", padding=True)
        room = max(len(q.answer) for q in batch) + 4
        made = model.generate(**inputs, max_new_tokens=room)[:, inputs["input_ids"].shape[1] :]
        for question, text in zip(batch, tokenizer.batch_decode(made, skip_special_tokens=True), strict=True):
            total[question.kind] += 1
            right[question.kind] += text == question.answer
    return {kind: right[kind] / total[kind] for kind in total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--peak", type=float, default=2e-2, help="highest learning rate")
    parser.add_argument("--tokens", type=int, default=2300, help="tokens in a batch, about")
    parser.add_argument("--check", type=int, default=2000, help="held-out questions asked afterwards")
    options = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    tokenizer = build_tokenizer()
    config = build_config(tokenizer)
    model = Qwen3ForCausalLM(Qwen3Config.from_dict(config))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    train(model, tokenizer, options.seed, options.steps, options.peak, options.tokens)
    write_folder(options.out, model, tokenizer, config)
    short = questions(options.check, options.seed + 1)
    long = long_questions(options.check // 4, options.seed + 1)
    for dtype in (torch.float32, torch.bfloat16):
        print(dtype, accuracy(options.out, short, dtype), "long", accuracy(options.out, long, dtype), flush=True)


if __name__ == "__main__":
    main()
