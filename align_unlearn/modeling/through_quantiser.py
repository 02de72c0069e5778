"""Training through the quantiser that will serve: the policy's forward pass sees the weights rounded, updates included.

What is learned then lives in what the rounding leaves. The gradient passes the rounding as if it were not there (the
straight-through estimator, arXiv:1308.3432). The original, adapters off, is not rounded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from align_unlearn.errors import UserError, unknown_name
from align_unlearn.modeling.plain import dequantised
from align_unlearn.modeling.roles import POLICY
from align_unlearn.modeling.round_trip import PRECISIONS


def train_through(model: Any, precision: str) -> int:
    """From now on every LoRA layer of the policy computes with round(W + ΔW); returns how many.

    Args:
        model: a PEFT model whose adapter is the policy.
        precision: of `PRECISIONS`.

    Raises:
        UserError: there is no such precision, or no LoRA layer.
    """
    check_through(precision)
    layers = [module for module in model.modules() if hasattr(module, "lora_A") and POLICY in module.lora_A]
    if not layers:
        raise UserError("There is no LoRA layer to train through.", where="survive")
    if any(hasattr(layer, "parameter_name") for layer in layers):
        raise UserError("Adapters on a mixture's experts are not trained through a quantiser.", where="survive",
                        fix="--lora_target_modules q_proj k_proj v_proj o_proj")  # fmt: skip
    for layer in layers:
        layer.register_forward_hook(_rounded(precision))
    return len(layers)


def check_through(precision: str | None) -> None:
    """Refuses a quantiser that there is not; none is nothing to refuse.

    Raises:
        UserError: as said.
    """
    if precision is not None and precision not in PRECISIONS:
        raise unknown_name("precision", precision, PRECISIONS, where="survive")


def _rounded(precision: str) -> Any:
    def hook(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if layer.disable_adapters or POLICY not in layer.active_adapters:
            return output
        base = layer.get_base_layer()
        update = layer.scaling[POLICY] * (layer.lora_B[POLICY].weight @ layer.lora_A[POLICY].weight)
        weight = dequantised(base) + update.float()
        with torch.no_grad():
            snapped = PRECISIONS[precision](weight.detach())
        through = weight + (snapped.to(weight.device) - weight).detach()
        bias = None if base.bias is None else base.bias.float()
        return nn.functional.linear(inputs[0].float(), through, bias).to(output.dtype)

    return hook
