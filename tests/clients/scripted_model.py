"""A model that says what a script has: whatever token comes last decides the next one.

Small models call no tools by themselves, and clients that only know `tool_choice: auto` need one that does. This one
is served like any other: its layers compute keys and values, but add nothing, and its head maps each piece of a text
to the piece behind it. Its chat template ends a prompt with the token that begins a text. Under a grammar, where the
script may not go on, its logits are as good as random.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import save_file
from scripts.make_random_model import RandomModel
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor

START, END = "<|im_start|>", "<|im_end|>"
HIDDEN = 256
CERTAIN = 40.0  # the logit of the next piece; all others are a few of noise

GREETING = "Hello! Two riders, one machine."
THOUGHT = "A greeting wants a greeting."
PLAIN = "Good day; no thought was given."
CALL_TEXT = "I shall look."
ANSWER = "It is 21 degrees in Rome."
WEATHER_ROME = {"name": "get_weather", "arguments": {"city": "Rome"}}
WEATHER_BERN = {"name": "get_weather", "arguments": {"city": "Bern"}}


def written_call(call: Mapping[str, object]) -> str:
    return f"<tool_call>\n{json.dumps(call)}\n</tool_call>"


SCRIPTS = {
    "greeting": f"<think>\n{THOUGHT}\n</think>\n\n{GREETING}",
    "plain": PLAIN,
    "call": f"{CALL_TEXT}\n{written_call(WEATHER_ROME)}",
    "calls": f"{written_call(WEATHER_ROME)}\n{written_call(WEATHER_BERN)}",
    "answer": ANSWER,
}
TEMPLATE = """
{%- if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>{% endif %}
{%- for message in messages %}
{{- START + message.role + '\\n' + (message.content or '') }}
{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}
{{- END + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- START + 'assistant\\n' }}
{%- if messages[-1].role == 'tool' %}{{ '<|answer|>' }}
{%- elif tools and 'both' in messages[-1].content %}{{ '<|calls|>' }}
{%- elif tools %}{{ '<|call|>' }}
{%- elif enable_thinking is defined and not enable_thinking %}{{ '<think></think><|plain|>' }}
{%- else %}{{ '<|greeting|>' }}
{%- endif %}
{%- endif %}""".replace("START", repr(START)).replace("END", repr(END))


def write_scripted_model(folder: Path) -> Path:
    """Write the model's folder; return it."""
    folder.mkdir(parents=True)
    pieces = _pieces(SCRIPTS.values())
    tokenizer = _tokenizer([piece for text in pieces for piece in text])
    ids = tokenizer.get_vocab(with_added_tokens=True)
    follows: dict[int, int] = {}
    for name, text in zip(SCRIPTS, pieces, strict=True):
        chain = [ids[f"<|{name}|>"], *(ids[piece] for piece in text), ids[END]]
        follows |= dict(pairwise(chain))
    model = RandomModel(hidden=HIDDEN, layers=2, vocab=len(ids), tied=False, eos_token_id=ids[END])
    save_file(_scripted(model, follows), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(model.config()))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def _scripted(model: RandomModel, follows: dict[int, int]) -> dict[str, Tensor]:
    tensors = dict(model.tensors())
    for name, weight in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.zero_()
    generator = torch.Generator().manual_seed(1)
    signs = torch.randint(0, 2, (model.vocab, model.hidden), generator=generator).float() * 2 - 1
    head = torch.zeros(model.vocab, model.hidden)
    for token, following in follows.items():
        head[following] += signs[token] * (CERTAIN / model.hidden)
    return tensors | {
        "model.embed_tokens.weight": signs,
        "model.norm.weight": torch.ones(model.hidden),
        "lm_head.weight": head,
    }


def _pieces(texts: Iterable[str]) -> list[list[str]]:
    """Cut texts into pieces of which no two are the same, in the tokenizer's alphabet: a piece is then its place."""
    alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    known: set[str] = set()
    found = []
    for text in texts:
        pieces = _cut(alphabet.pre_tokenize_str(text)[0][0], known)
        assert pieces is not None, f"{text!r} cannot be told from the other scripts"
        known |= set(pieces)
        found.append(pieces)
    return found


def _cut(text: str, known: set[str]) -> list[str] | None:
    """Return pieces of a text that are not known, of two characters or more; None if there are none."""
    if not text:
        return []
    for size in range(2, len(text) + 1):
        piece = text[:size]
        rest = None if piece in known else _cut(text[size:], known | {piece})
        if rest is not None:
            return [piece, *rest]
    return None


def _tokenizer(pieces: list[str]) -> Tokenizer:
    """One token per byte, of which prompts are made; and the pieces, which no text is encoded to."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={token: index for index, token in enumerate([*alphabet, *pieces])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([START, END, *(f"<|{name}|>" for name in SCRIPTS)])
    return tokenizer
