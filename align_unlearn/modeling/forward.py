"""The backbone's final hidden states: what every objective and every metric here is computed from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import ModuleList

from align_unlearn.errors import UserError


def hidden_states(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Final hidden states (B, T, H) of a causal LM, after its last norm, before its LM head.

    Args:
        model: a causal LM, with or without adapters; the adapters that are on take part.
        input_ids: (B, T).
        attention_mask: (B, T), 1 on text and 0 on padding.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    outputs = base.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    states: Tensor = outputs.last_hidden_state
    return states


@contextlib.contextmanager
def frozen(model: Any) -> Iterator[None]:
    """Within the block, no parameter that the model has now asks for a gradient."""
    asked = [(each, each.requires_grad) for each in model.parameters()]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, before in asked:
            parameter.requires_grad_(before)


def quick_products(device: torch.device) -> torch.autocast:
    """A block in which products are taken in bf16 where the device has them; elsewhere they would be emulated."""
    if device.type == "cuda":
        quick = bool(torch.cuda.is_bf16_supported())
    else:
        known: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # which older versions do not say
        quick = bool(known.get("avx512_bf16") or known.get("amx_bf16"))
    return torch.autocast(device.type, torch.bfloat16, enabled=quick)


def layer_states(model: Any, layer: int, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Output (B, T, H) of one decoder layer; what lies above it is not computed.

    Args:
        model: a causal LM, with or without adapters.
        layer: counted from 0.
        input_ids: (B, T).
        attention_mask: (B, T).
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found: list[Tensor] = []

    def stop(_: Any, __: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)
        raise _Reached

    hook = decoder_layers(model)[layer].register_forward_hook(stop)
    try:
        with contextlib.suppress(_Reached):
            base.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    finally:
        hook.remove()
    return found[0]


def decoder_layers(model: Any) -> Any:
    """The list of decoder layers of a causal LM, wherever its family keeps them.

    Raises:
        UserError: none was found.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    depth = base.config.get_text_config().num_hidden_layers
    for module in base.modules():
        if isinstance(module, ModuleList) and len(module) == depth:
            return module
    raise UserError(f"The decoder layers of {type(base).__name__} were not found.", where="objective_kwargs: layer")


def layer_index(model: Any, layer: float | str) -> int:
    """The decoder layer that `layer` stands for, counted from 0; see `layer_of_depth`.

    Raises:
        UserError: there is no such layer.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return layer_of_depth(base.config.get_text_config().num_hidden_layers, layer)


def layer_of_depth(depth: int, layer: float | str) -> int:
    """The decoder layer that `layer` stands for in a model of `depth` layers, counted from 0.

    Args:
        depth: how many layers there are.
        layer: an index, a fraction of the depth in (0, 1), or a name that ends in the index (`model.layers.7`).

    Raises:
        UserError: there is no such layer.
    """
    number = str(layer).rpartition(".")[2] if isinstance(layer, str) and not _is_number(layer) else layer
    if _is_number(number):
        value = float(number)
        index = int(value * depth) if 0 < value < 1 else int(value)
        if 0 <= index < depth and (0 < value < 1 or index == value):
            return index
    raise UserError(
        f"There is no layer {layer} in a model of {depth} layers.",
        where="objective_kwargs: layer",
        fix=f"an index from 0 to {depth - 1}, a fraction of the depth such as 0.25, or a name such as model.layers.7",
    )


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


class _Reached(Exception):
    """Ends a forward pass at the layer that was asked for."""
