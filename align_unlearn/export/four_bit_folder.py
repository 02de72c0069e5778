"""A pre-quantised bitsandbytes folder: the codes that were chosen, as `from_pretrained` loads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from align_unlearn.config import BaseModelConfig
from align_unlearn.errors import UserError
from align_unlearn.export.packed import four_bit_bytes
from align_unlearn.export.rounded import Codes
from align_unlearn.modeling.load import held_as, load_base


def write_four_bit(
    target: Any, config: BaseModelConfig, codes: Codes, folder: Path, precision: str, *, trust_remote_code: bool
) -> None:
    """Writes the base, held in `precision`, with these codes and scales, and all else that the target has of its own.

    Args:
        target: the plain model that is shipped; what bitsandbytes does not quantise (a mixture's experts, embeddings,
            norms, biases) is taken from it.
        config: of the base.
        codes: of every quantised layer.
        folder: to write to.
        precision: `nf4` or `fp4`.
        trust_remote_code: run code that comes with the model.

    Raises:
        UserError: a layer that bitsandbytes would quantise has no codes.
    """
    held = held_as(config, load_in_4bit=True, load_in_8bit=False, after=None, bnb_4bit_quant_type=precision,
                   use_bnb_nested_quant=False)  # fmt: skip
    model = load_base(held, trust_remote_code=trust_remote_code)
    for name, module in model.named_modules():
        if hasattr(module.__dict__.get("_parameters", {}).get("weight"), "quant_state"):
            if name not in codes:
                raise UserError(f"The layer {name} cannot be rounded in blocks of 64.", where="--precision")
            _set_codes(module, codes, name)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not hasattr(parameter, "quant_state"):
                parameter.copy_(target.get_parameter(name))
    model.save_pretrained(folder)


def _set_codes(module: Any, codes: Codes, name: str) -> None:
    grid, own = codes[name]
    state = module.weight.quant_state
    packed = torch.from_numpy(four_bit_bytes(own, grid, state.code.cpu()))
    module.weight.data = (
        packed.view(module.weight.data.dtype).reshape(module.weight.data.shape).to(module.weight.device)
    )
    state.absmax = grid.scale.reshape(-1).float().to(state.absmax.device)
