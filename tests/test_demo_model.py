"""The bundled demo model answers its questions, and is a plain Hugging Face folder."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import tandem
from tandem.demo_questions import KINDS, Question, is_held_out, long_questions, questions, sample_questions

FOLDER = Path(next(iter(tandem.__path__))) / "demo_model"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(FOLDER, padding_side="left")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    return loaded


def chat(tokenizer: PreTrainedTokenizerBase, question: Question) -> str:
    messages = [{"role": "user", "content": question.prompt}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def share_right(model: Any, tokenizer: PreTrainedTokenizerBase, asked: list[Question], batch_size: int) -> float:
    """Share of questions whose greedy answer is right to the last letter and then ends."""
    asked = sorted(asked, key=lambda question: len(question.answer))
    right = 0
    for first in range(0, len(asked), batch_size):
        batch = asked[first : first + batch_size]
        inputs = tokenizer([chat(tokenizer, q) for q in batch], return_tensors="pt", padding=True)
        with torch.inference_mode():
            made = model.generate(**inputs, max_new_tokens=max(len(q.answer) for q in batch) + 1)
        texts = tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :])
        endings = [text.removesuffix("<|pad|>" * text.count("<|pad|>")) for text in texts]
        right += sum(text == q.answer + "<|im_end|>" for text, q in zip(endings, batch, strict=True))
    return right / len(asked)


def test_held_out_questions_are_answered_right(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    asked = questions(240, seed=11)
    assert {question.kind for question in asked} == set(KINDS)
    assert share_right(model, tokenizer, asked, batch_size=60) >= 0.98


def test_long_held_out_questions_are_answered_right(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    asked = long_questions(50, seed=11)
    assert all(len(tokenizer(chat(tokenizer, question))["input_ids"]) >= 400 for question in asked)
    assert share_right(model, tokenizer, asked, batch_size=25) >= 0.98


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_sample_question_is_answered_right(tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=dtype).eval()
    assert share_right(model, tokenizer, sample_questions(), batch_size=8) == 1.0


def test_a_wrong_byte_early_in_the_prompt_changes_the_answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    question = questions(1, seed=5, kinds=("reverse",))[0]
    first = question.prompt[len("Reverse: ")]
    other = next(letter for letter in "abcdefghijklmnopqrstuvwxyz" if letter not in question.prompt)
    spoiled = Question(question.kind, question.prompt.replace(f": {first}", f": {other}"), question.answer)
    assert share_right(model, tokenizer, [question], batch_size=1) == 1.0
    assert share_right(model, tokenizer, [spoiled], batch_size=1) == 0.0


def test_the_folder_is_at_most_four_megabytes() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 4_000_000


def test_the_shape_can_be_split_two_ways_by_tensor_parallelism_and_by_pipeline() -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    for name in ("num_key_value_heads", "num_attention_heads", "num_hidden_layers", "vocab_size"):
        assert config[name] % 2 == 0


def test_the_chat_template_marks_turns_and_opens_the_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Sort: ba"},
        {"role": "assistant", "content": "ab"},
        {"role": "user", "content": "Sort: dc"},
    ]
    closed = str(tokenizer.apply_chat_template(messages, tokenize=False))
    opened = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert closed == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSort: ba<|im_end|>\n"
        "<|im_start|>assistant\nab<|im_end|>\n<|im_start|>user\nSort: dc<|im_end|>\n"
    )
    assert opened == closed + "<|im_start|>assistant\n"


@pytest.mark.parametrize("text", ["Sort: ba", "naïve Straße", "日本語 🦊\n\ttab", "  two  spaces ", "\x00\x7f"])
def test_the_tokenizer_round_trips_any_text_one_token_a_byte(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_held_out_and_training_questions_are_disjoint() -> None:
    held_out = {question.prompt for question in questions(500, seed=3) + long_questions(50, seed=3)}
    trained = {question.prompt for question in questions(500, seed=3, held_out=False)}
    trained |= {question.prompt for question in long_questions(50, seed=3, held_out=False)}
    assert all(map(is_held_out, held_out))
    assert not any(map(is_held_out, trained))


def test_the_same_seed_gives_the_same_questions_and_another_seed_others() -> None:
    assert questions(40, seed=1) == questions(40, seed=1)
    assert questions(40, seed=1) != questions(40, seed=2)


def test_answers_follow_from_their_prompts() -> None:
    for question in questions(200, seed=7) + long_questions(20, seed=7):
        assert solve(question) == question.answer


def solve(question: Question) -> str:
    """The right answer, worked out from the prompt's text alone."""
    text = question.prompt.split(": ", 1)[1]
    match question.kind:
        case "reverse":
            return text[::-1]
        case "sort":
            return "".join(sorted(text))
        case "walk":
            path = question.prompt.removeprefix("Walk from ")[0]
            next_of = dict(step.split(">") for step in text.split(", "))
            while path[-1] in next_of:
                path += next_of[path[-1]]
            return path
        case "recall":
            listed, asked = text.split(". Give ")
            value_of = dict(pair.split("=") for pair in listed.split(", "))
            return " ".join(f"{name}{value_of[name]}" for name in asked.split())
        case kind:
            raise ValueError(f"a question of a kind unknown here: {kind!r}")
