"""A pre-quantised bitsandbytes folder: the codes that were chosen, as `from_pretrained` loads them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from bitsandbytes import functional

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
            _set_codes(module, codes, name, precision)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not hasattr(parameter, "quant_state"):
                parameter.copy_(target.get_parameter(name))
    model.generation_config = copy.deepcopy(target.generation_config)
    _say_as_written(model, precision)
    # transformers cannot undo what it did to load weights that came quantised, and what is written loads as it is
    model.save_pretrained(folder, save_original_format=not model.hf_quantizer.pre_quantized)


def _say_as_written(model: Any, precision: str) -> None:
    """A base that came quantised says how it came; what is written is of one kind, its scales in fp32."""
    said = model.config.quantization_config
    said.bnb_4bit_quant_type, said.bnb_4bit_use_double_quant = precision, False


def _set_codes(module: Any, codes: Codes, name: str, precision: str) -> None:
    grid, own = codes[name]
    weight = module.weight
    before, device = weight.quant_state, weight.device
    table = functional.get_4bit_type(precision, device="cpu")
    packed = torch.from_numpy(four_bit_bytes(own, grid, table))
    weight.data = packed.view(weight.data.dtype).reshape(weight.data.shape).to(device)
    # made anew: the base's own may be of the other kind, or hold its scales quantised
    weight.quant_state = functional.QuantState(
        absmax=grid.scale.reshape(-1).float().to(device), shape=before.shape, code=table.to(device),
        blocksize=grid.block, quant_type=precision, dtype=before.dtype,
    )  # fmt: skip
    weight.quant_type, weight.compress_statistics, module.quant_state = precision, False, weight.quant_state
