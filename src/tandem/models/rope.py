"""Rotary position embedding: frequencies, and the table of cosines and sines."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tandem.models.model_config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Return float32 [head_dim / 2], on the CPU."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies: Tensor = 1.0 / (rope.theta**exponents)
    if rope.type == "linear":
        return frequencies / rope.factor
    if rope.type == "llama3":
        return _llama3(frequencies, rope)
    return frequencies


def _llama3(frequencies: Tensor, rope: RopeConfig) -> Tensor:
    """Slow long waves by the factor, keep short ones and blend those between (Llama 3.1)."""
    wavelengths = 2 * math.pi / frequencies
    context = rope.original_max_positions
    slowed = frequencies / rope.factor
    keep = (context / wavelengths - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - keep) * slowed + keep * frequencies
    scaled = torch.where(wavelengths > context / rope.low_freq_factor, slowed, blended)
    return torch.where(wavelengths < context / rope.high_freq_factor, frequencies, scaled)


class RotaryTable:
    """Cosines and signed sines of every position needed so far; grows by doubling.

    With `rotated = cat(x[half:], x[:half])` the embedding is `x * cos + rotated * signed_sin`, where the first
    half of `signed_sin` carries the minus of the usual `rotate_half`.
    """

    def __init__(self, rope: RopeConfig, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self._frequencies = inverse_frequencies(rope, head_dim)
        self._dtype = dtype
        self._device = device
        self._cos = self._sin = torch.empty(0, 1, head_dim, dtype=dtype, device=device)

    def at(self, positions: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """Return cosine and signed sine, each [N, 1, head_dim], of `positions` [N], all of them below `end`."""
        if end > self._cos.shape[0]:
            self._grow(max(256, 1 << (end - 1).bit_length()))
        return self._cos[positions], self._sin[positions]

    def _grow(self, length: int) -> None:
        angles = torch.arange(length).float()[:, None] * self._frequencies[None, :]  # [length, head_dim / 2]
        cos, sin = angles.cos(), angles.sin()
        self._cos = self._convert(torch.cat((cos, cos), dim=-1))
        self._sin = self._convert(torch.cat((-sin, sin), dim=-1))

    def _convert(self, table: Tensor) -> Tensor:
        return table.unsqueeze(1).to(self._device, self._dtype)
