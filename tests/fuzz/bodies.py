"""Bodies and headers of HTTP requests: OpenAI's, with what clients should not send."""

from __future__ import annotations

import json
import random
from typing import Any

from tandem.api.openai import ChatBody, CompletionBody
from tandem.api.parsing import NOT_SERVED
from tests.fuzz.generator import MessageGenerator, Tree
from tests.fuzz.mutator import TEXTS, mutate, spoil

WORDS = ["hello", "user", "system", "text", "demo", "<|im_end|>", "", "a", "none", "auto"]
NUMBERS = [0, 1, 2, 16, 20, 21, 64, 127, 128, 129, 255, 256, 257, 4096]
PLAIN: list[dict[str, Any]] = [
    {"prompt": "hello", "max_tokens": 4},
    {"prompt": ["a", "b"], "n": 2, "max_tokens": 2, "logprobs": 2, "echo": False},
    {"prompt": [1, 2, 3], "temperature": 0.5, "top_p": 0.9, "seed": 1, "stop": ["a", "b"], "stream": True},
    {"prompt": [[1], [2, 3]], "logit_bias": {"5": 1.0}, "presence_penalty": 1, "stop_token_ids": [3]},
    {"prompt": "x", "stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True},
    {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "logprobs": True, "top_logprobs": 3},
    {"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b", "name": "c"}], "stream": True},
    {"input": "hello", "instructions": "be brief", "max_output_tokens": 4, "stream": True},
    {"input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}]},
    {"messages": [{"role": "user", "content": "a"}], "system": "b", "max_tokens": 4, "stop_sequences": ["c"]},
    {"tokens": [1, 2, 3], "messages": [{"role": "user", "content": "a"}], "return_token_strs": True},
    {"prompt": "x", "guided_regex": "[ab]+", "max_tokens": 4},
    {"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "json_object"}, "max_tokens": 4},
    {
        "messages": [{"role": "user", "content": "a"}],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        "tool_choice": "required",
    },
    {"prompt": "x", "kv_transfer_params": {"do_remote_decode": True, "do_remote_prefill": False}},
    {
        "prompt": [5, 6],
        "kv_transfer_params": {
            "do_remote_prefill": True,
            "remote_engine_id": "prefill-0",
            "remote_request_id": "r",
            "remote_block_ids": [1, 2],
            "remote_host": "127.0.0.1",
            "remote_port": 1,
            "tp_size": 1,
        },
    },
]
HEADERS = ("X-Request-Id", "Authorization", "Content-Type", "Content-Length", "Accept", "Expect", "Transfer-Encoding")
MOST_CHOICES = 8


class Bodies:
    """Makes bodies for /v1/completions and /v1/chat/completions."""

    def __init__(self) -> None:
        self._generators = [MessageGenerator(kind, WORDS, NUMBERS) for kind in (CompletionBody, ChatBody)]

    def body(self, rng: random.Random, most_choices: int = MOST_CHOICES) -> bytes:
        """Return a body. Choices and tokens are kept few: to count them is not what is tested."""
        chance = rng.random()
        tree = json.loads(json.dumps(rng.choice(PLAIN)))
        if chance < 0.3:
            extra = rng.choice(self._generators).tree(rng)
            for name in rng.sample(sorted(extra), min(len(extra), 4)):
                tree[name] = extra[name]
        if rng.random() < 0.1:
            name = rng.choice(sorted(NOT_SERVED))
            tree[name] = rng.choice([None, *NOT_SERVED[name], *TEXTS[:3]])
        if chance > 0.2:
            tree = mutate(tree, rng)
        if isinstance(tree, dict):
            for name, most in (("n", most_choices), ("best_of", most_choices), ("max_tokens", 64)):
                if isinstance(tree.get(name), int) and most < tree[name] <= 128:
                    tree[name] = most
        data = to_json(tree)
        return spoil(data, rng) if chance > 0.9 else data

    def headers(self, rng: random.Random) -> dict[str, str]:
        if rng.random() < 0.7:
            return {}
        return {rng.choice(HEADERS[:3]): rng.choice(["x", "Bearer ", "a b", "x" * 5000, "\xff", "0", "-1", "%00"])}


def to_json(tree: Tree) -> bytes:
    """Return JSON, with NaN and Infinity as Python writes them, and sometimes more of it than JSON allows."""
    return json.dumps(_text_keys(tree), ensure_ascii=False).encode("utf-8", "surrogatepass")


def _text_keys(tree: Tree) -> Tree:
    """Give a tree what JSON can carry, without recursion: it may be deep."""
    root = [tree]
    waiting: list[tuple[Any, Any]] = [(root, 0)]
    while waiting:
        parent, key = waiting.pop()
        value = parent[key]
        if isinstance(value, bytes):
            parent[key] = value.decode("latin-1")
        elif isinstance(value, dict):
            parent[key] = copy = {str(name): one for name, one in value.items()}
            waiting += [(copy, name) for name in copy]
        elif isinstance(value, list | tuple):
            parent[key] = items = list(value)
            waiting += [(items, place) for place in range(len(items))]
    return root[0]
