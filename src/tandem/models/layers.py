"""The small parts of a decoder layer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# Below these sizes (elements) a packed weight gains nothing: the call costs more than the product.
PACK_FROM = {torch.bfloat16: 1 << 16, torch.float32: 1 << 18}


class Linear:
    """`x @ weight.T + bias`; the weight may be packed for the CPU's matrix kernels."""

    def __init__(self, num_outputs: int, num_inputs: int, bias: bool, dtype: torch.dtype, device: torch.device) -> None:
        self.weight: Tensor | None = torch.empty(num_outputs, num_inputs, dtype=dtype, device=device)
        self.bias: Tensor | None = torch.empty(num_outputs, dtype=dtype, device=device) if bias else None
        self._packed: Tensor | None = None

    @classmethod
    def of(cls, weight: Tensor) -> Linear:
        """With a weight that is also used elsewhere."""
        linear = cls(0, 0, False, weight.dtype, weight.device)
        linear.weight = weight
        return linear

    def pack(self) -> None:
        """Brings the weight, once loaded, into oneDNN's blocked order and lets go of the plain one.

        At one row, where the weights' way from memory is what costs, this takes a half to a third of the time.
        Does nothing on other devices, for small weights, and for dtypes that this CPU does not compute in.
        """
        weight = self.weight
        if weight is None or not _can_pack(weight):
            return
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        self.weight = None

    def __call__(self, x: Tensor) -> Tensor:
        """[..., num_inputs] -> [..., num_outputs]."""
        if self.weight is not None:
            return F.linear(x, self.weight, self.bias)
        packed: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return packed


def _can_pack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or weight.numel() < PACK_FROM.get(weight.dtype, weight.numel() + 1):
        return False
    if not torch._C._has_mkldnn or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    return weight.dtype != torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Root mean square norm over the last dimension, computed in float32 whatever the dtype of `x`
    (Zhang and Sennrich, 2019)."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """[N, 2 I], the gates first -> [N, I] (Shazeer, 2020)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor, out: Tensor) -> None:
    """Rotary embedding of `x` [N, heads, head_dim] into `out`, which may be `x`; see `RotaryTable`."""
    rotated = x.roll(x.shape[-1] // 2, -1)
    torch.mul(x, cos, out=out)
    out.addcmul_(rotated, signed_sin)
