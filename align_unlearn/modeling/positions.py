"""Stretched positions in GGUF files: Llama 3.1 and later turn slow rotations still slower.

llama.cpp divides the frequency of each rotation by a factor that the file holds as a tensor. transformers reads neither
the tensor nor the setting that it came from, so that what is loaded back would see other positions than what is served.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FACTORS = "rope_freqs.weight"
"""What GGUF calls the tensor."""
WRITTEN = ("default", "llama3")
"""Kinds of positions that a GGUF file can say: as they are, and stretched by factors."""


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
    """Gives a model that transformers read from a GGUF file the positions that the file says."""
    import gguf

    factors = [torch.tensor(each.data) for each in gguf.GGUFReader(file).tensors if each.name == FACTORS]
    for module in model.modules() if factors else ():
        if hasattr(module, "inv_freq"):
            module.inv_freq.div_(factors[0])
