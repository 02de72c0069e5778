"""A model with its adapters merged in and its quantisation undone, as a plain one: to be written, or to be attacked.

Every layer is de-quantised in fp32 (exactly what an adapter was trained on), the adapter's update is added in fp32, and
the sum is rounded once, to the dtype asked for. Nothing is changed in the model that it is made from.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from align_unlearn.errors import UserError
from align_unlearn.modeling.earlier import earlier_update


def plain_copy(model: Any, dtype: torch.dtype, *, adapters_off: bool = False) -> Any:
    """A copy of a causal LM without adapters and quantisation, in evaluation mode, on the same device.

    Args:
        model: with or without adapters, in any precision.
        dtype: of the copy.
        adapters_off: leave the adapters out: the original.

    Raises:
        UserError: an adapter is of a kind that is not a sum of base and update.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    plain = empty_plain(base, dtype)
    weights = merged_weights(model, dtype, adapters=[] if adapters_off else None)
    plain.to_empty(device="cpu")
    _restore_rotary(plain, base)
    check_whole(plain, weights)
    plain.load_state_dict({name: weights[name] for name in plain.state_dict() if name in weights}, strict=False)
    plain.tie_weights()
    plain.generation_config = copy.deepcopy(base.generation_config)
    return plain.to(base.device).eval()


def empty_plain(base: Any, dtype: torch.dtype) -> Any:
    """A model of the base's shape on the meta device, its configuration without quantisation."""
    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = dtype
    with torch.device("meta"):
        plain = type(base)(config)
    return plain.to(dtype)


def check_whole(plain: Any, weights: dict[str, Tensor]) -> None:
    """Refuses weights that leave some of a model's own unset.

    Raises:
        UserError: a name is missing.
    """
    tied = {"lm_head.weight"} if plain.config.get_text_config().tie_word_embeddings else set()
    if missing := set(plain.state_dict()) - set(weights) - tied:
        raise UserError(f"The merge has no weight for {sorted(missing)[:3]}.", where=type(plain).__name__)


@torch.no_grad()
def merged_weights(model: Any, dtype: torch.dtype, *, adapters: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Every weight of the plain model by its plain name, in `dtype`, on the CPU.

    Args:
        adapters: those to merge; the active ones where none are named.

    Raises:
        UserError: a layer carries an adapter of a kind that is not a sum of base and update.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    merged = list(adapters if adapters is not None else model.active_adapters if base is not model else [])
    check_sums(model, merged)
    weights: dict[str, Tensor] = {}
    for name, layer in adapted(base).items():
        weights[name] = merged_layer(layer, name, merged).to(dtype)
    for name, parameter in [*base.named_parameters(), *base.named_buffers()]:
        plain = name.replace(".base_layer", "")
        if plain not in weights and ".lora_" not in name:
            owner = base.get_submodule(name.rpartition(".")[0])
            weights[plain] = dequantised(owner).to(dtype) if name.endswith(".weight") else parameter.to(dtype)
    return {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}


def adapted(model: Any) -> dict[str, Any]:
    """PEFT's layers that carry a LoRA adapter, by the plain name of the weight that each changes.

    Most wrap a linear layer; the experts of a mixture are one parameter for all of them, and those layers wrap that.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {
        f"{name.replace('.base_layer', '')}.{getattr(module, 'parameter_name', 'weight')}": module
        for name, module in base.named_modules()
        if hasattr(module, "lora_A")
    }


def check_sums(model: Any, adapters: Sequence[str]) -> None:
    """Refuses adapters that this module would leave out without a word.

    Raises:
        UserError: one is no LoRA, changes embeddings, or brings whole modules of its own.
    """
    for name in adapters:
        config = model.peft_config[name]
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if kind != "LORA":
            raise UserError(f"An adapter of kind {kind} is not merged here.", where=name, fix="a LoRA adapter")
        if getattr(config, "modules_to_save", None):
            raise UserError(f"The adapter brings whole modules of its own: {', '.join(config.modules_to_save)}.",
                            where=name, fix="train without --lora_modules_to_save")  # fmt: skip
        if any(name in getattr(module, "lora_embedding_A", ()) for module in model.modules()):
            raise UserError("LoRA on embeddings is not merged here.", where=name, fix="LoRA on linear layers")


def merged_layer(layer: Any, name: str, adapters: list[str]) -> Tensor:
    """W + ΔW of one LoRA layer, fp32.

    Raises:
        UserError: the adapter is DoRA, whose update is no sum.
    """
    weight = adapted_weight(layer)
    for adapter in adapters:
        if adapter not in layer.lora_A:
            continue
        if getattr(layer, "use_dora", {}).get(adapter):
            raise UserError("DoRA adapters are not merged yet.", where=name, fix="train with --use_dora false")
        weight = weight + layer.get_delta_weight(adapter).float().to(weight.device)
    return weight


def adapted_weight(layer: Any) -> Tensor:
    """The weight beneath a LoRA layer in fp32, as `dequantised`."""
    if hasattr(layer, "parameter_name"):
        found: Tensor = layer.get_param().detach().float()
        return found
    return dequantised(layer.get_base_layer())


def dequantised(layer: nn.Module) -> Tensor:
    """The weight of a linear layer in fp32, whatever it is held in, with the updates of earlier runs that lie on it."""
    found, update = _held(layer), earlier_update(layer)
    return found if update is None else found + update.to(found.device)


def held_weight(model: Any, name: str) -> Tensor:
    """The weight of a base's linear layer as it is held, in fp32: on the grid of its quantisation, without any update.

    Args:
        model: a causal LM, with or without adapters.
        name: of the layer in the plain model.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layer = base.get_submodule(name)
    return _held(layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer)


def _held(layer: nn.Module) -> Tensor:
    from peft.utils.integrations import dequantize_module_weight

    weight = layer.weight
    if isinstance(weight, Tensor) and weight.is_floating_point() and not hasattr(weight, "quant_state"):
        return weight.detach().float()
    found: Tensor = dequantize_module_weight(layer).detach().float()
    return found


def _restore_rotary(plain: Any, base: Any) -> None:
    """Buffers that no file holds (rotary frequencies) are the base's."""
    own = dict(base.named_buffers())
    for name, buffer in plain.named_buffers():
        if name in own:
            owner = plain.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], own[name].detach().clone().to("cpu"))
        elif buffer.numel():
            raise UserError(f"The buffer {name} of the copy has no counterpart.", where=type(base).__name__)
