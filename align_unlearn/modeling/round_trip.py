"""What a weight is after it was quantised and read back: the precisions that models are served in.

bitsandbytes' NF4 and FP4 (blocks of 64), LLM.int8's rows, and llama.cpp's Q8_0, Q5_1 and Q4_0 by the `gguf` library.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from align_unlearn.errors import unknown_name


def four_bit(weight: Tensor, quant_type: str) -> Tensor:
    """bitsandbytes' 4-bit codes and back."""
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(weight.float().contiguous(), blocksize=64, quant_type=quant_type)
    found: Tensor = functional.dequantize_4bit(codes, state)
    return found


def int8(weight: Tensor) -> Tensor:
    """LLM.int8's weights: each row over its largest magnitude, in 127 steps to either side."""
    scale = weight.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
    return (weight.float() / scale).round().clamp(-127, 127) * scale


def gguf_blocks(weight: Tensor, name: str) -> Tensor:
    """llama.cpp's blocks of 32 along a row; a row that they do not divide stays as it is, as llama.cpp leaves it."""
    import gguf

    if weight.shape[-1] % 32:
        return weight.float()
    kind = getattr(gguf.GGMLQuantizationType, name.upper())
    blocks = gguf.quants.quantize(weight.detach().float().cpu().numpy(), kind)
    return torch.from_numpy(np.ascontiguousarray(gguf.quants.dequantize(blocks, kind))).to(weight.device)


PRECISIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "nf4": lambda weight: four_bit(weight, "nf4"),
    "fp4": lambda weight: four_bit(weight, "fp4"),
    "int8": int8,
    "q8_0": lambda weight: gguf_blocks(weight, "q8_0"),
    "q5_1": lambda weight: gguf_blocks(weight, "q5_1"),
    "q4_0": lambda weight: gguf_blocks(weight, "q4_0"),
}


def linear_layers(model: Any) -> dict[str, nn.Linear]:
    """The linear layers of a plain causal LM that quantisers touch: all but the LM head."""
    head = model.get_output_embeddings()
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
    }


def vocabulary_tables(model: Any) -> dict[str, Any]:
    """By name, a plain model's input embedding and its LM head; the former alone where they are one weight."""
    names = {module: name for name, module in model.named_modules()}
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    if ends[0].weight is ends[1].weight:
        ends.pop()
    return {names[each]: each for each in ends}


@torch.no_grad()
def requantise(model: Any, precision: str) -> None:
    """Replaces every linear weight of a plain model by what `precision` leaves of it.

    Raises:
        UserError: there is no such precision.
    """
    if precision not in PRECISIONS:
        raise unknown_name("precision", precision, PRECISIONS)
    for layer in linear_layers(model).values():
        layer.weight.copy_(PRECISIONS[precision](layer.weight))
