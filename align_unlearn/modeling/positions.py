"""Stretched positions in GGUF files: Llama 3.1 and later turn slow rotations still slower.

llama.cpp divides the frequency of each rotation by a factor that the file holds as a tensor. transformers reads neither
the tensor nor the setting that it came from, so that what is loaded back would see other positions than what is served.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align_unlearn.errors import UserError

FACTORS = "rope_freqs.weight"
"""What GGUF calls the tensor."""
STRETCHED = ("llama3",)
"""Kinds of positions that the factors say; llama.cpp reads them for llama models."""


def position_factors(config: Any) -> Tensor | None:
    """(head_dim / 2,) what each frequency is divided by, fp32; none where positions are as they are.

    Args:
        config: of a text model.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = dict(getattr(config, "rope_parameters", None) or {})
    if rope.get("rope_type", "default") == "default":
        return None
    stretched, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu")
    size = 2 * stretched.shape[0]
    plain = float(rope["rope_theta"]) ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
    factors: Tensor = plain / stretched
    return factors


def stretch_positions(model: Any, file: Path) -> None:
    """Gives a model that transformers read from a GGUF file the positions that the file says.

    Raises:
        UserError: the model has no rotations of that number.
    """
    import gguf

    factors = [torch.tensor(each.data) for each in gguf.GGUFReader(file).tensors if each.name == FACTORS]
    if not factors:
        return
    turned = [module for module in model.modules() if getattr(module, "inv_freq", None) is not None]
    if not turned or any(module.inv_freq.shape != factors[0].shape for module in turned):
        raise UserError("The file's positions are not those of the model that transformers makes of it.",
                        where=str(file))  # fmt: skip
    for module in turned:
        for name in ("inv_freq", "original_inv_freq"):
            if getattr(module, name, None) is not None:
                getattr(module, name).div_(factors[0])
