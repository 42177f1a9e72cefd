"""The parts of a decoder layer that are not split over ranks; for those see `tandem.models.tensor_parallel`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# Below these sizes (elements) a packed weight gains nothing: the call costs more than the product.
PACK_FROM = {torch.bfloat16: 1 << 16, torch.float32: 1 << 18}


class Linear:
    """`x @ weight.T + bias`: [..., num_inputs] -> [..., num_outputs]."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias
        self._packed: Tensor | None = None

    def pack(self) -> None:
        """Bring the weight, once loaded, into oneDNN's blocked order, and let go of the plain one.

        At one row, where the weights' way from memory is what costs, this takes a half to a third of the time.
        Does nothing on other devices, for small weights, and for dtypes that this CPU does not compute in.
        """
        if _can_pack(self.weight):
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight)
            self.weight = self.weight.new_empty(0)

    def __call__(self, x: Tensor) -> Tensor:
        if self._packed is None:
            return F.linear(x, self.weight, self.bias)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return product


def _can_pack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or weight.numel() < PACK_FROM.get(weight.dtype, weight.numel() + 1):
        return False
    if not torch._C._has_mkldnn or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    return weight.dtype != torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Divide by the root mean square over the last dimension, in float32 for any dtype of `x`
    (Zhang and Sennrich, 2019)."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """[N, 2 I], the gates first -> [N, I] (Shazeer, 2020)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor, out: Tensor) -> None:
    """Rotate `x` [N, heads, head_dim] by its positions into `out`, which may be `x`; see `RotaryTable`."""
    rotated = x.roll(x.shape[-1] // 2, -1)
    torch.mul(x, cos, out=out)
    out.addcmul_(rotated, signed_sin)
