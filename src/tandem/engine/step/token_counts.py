"""How often each token occurs in a request, for penalties; kept up to date rather than counted at each step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class TokenCounts:
    """Occurrences in the tokens of one request, of which the first `prompt_len` are its prompt."""

    def __init__(self, tokens: Sequence[int], prompt_len: int) -> None:
        self._prompt = list(tokens[:prompt_len])
        self._output = list(tokens[prompt_len:])
        self._length = len(tokens)
        self._seen: Tensor | None = None
        self._counts: Tensor | None = None

    def __len__(self) -> int:
        """The number of tokens, prompt and output."""
        return self._length

    def extend(self, tokens: Sequence[int]) -> None:
        """Add output tokens."""
        self._output += tokens
        self._length += len(tokens)

    def occurrences(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return, like `logits` [vocabulary], which tokens occur at all, bool, and how often in the output.

        Raises IndexError or RuntimeError for a token that is not in the vocabulary, and does so again when asked again.
        """
        if self._seen is None or self._counts is None:
            self._seen, self._counts = torch.zeros_like(logits, dtype=torch.bool), torch.zeros_like(logits)
        new = torch.tensor(self._output, dtype=torch.long, device=logits.device)
        self._seen[torch.tensor(self._prompt, dtype=torch.long, device=logits.device)] = True
        self._seen[new] = True
        self._counts.index_add_(0, new, torch.ones_like(new, dtype=logits.dtype))
        self._prompt, self._output = [], []
        return self._seen, self._counts
