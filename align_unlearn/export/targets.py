"""Which weights are shipped: the base as it was trained on, or as it was before quantisation, each with the update."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from align_unlearn.config import BaseModelConfig
from align_unlearn.errors import UserError, unknown_name
from align_unlearn.modeling.load import held_as, load_base, load_weights_config
from align_unlearn.modeling.plain import adapted, adapted_weight, check_sums, merged_layer, plain_copy


def dequantised_target(model: Any, config: BaseModelConfig, trust_remote_code: bool) -> Any:
    """The base de-quantised as it was trained on, plus the update: what was trained, exactly."""
    return plain_copy(model, torch.float32)


@torch.no_grad()
def original16_target(model: Any, config: BaseModelConfig, trust_remote_code: bool) -> Any:
    """The base's own 16-bit weights plus the update.

    What the base's quantisation took away comes back with them: it is a model that nobody has trained or audited, near
    the one that was.

    Raises:
        UserError: an adapter's update depends on the weight that it is added to (DoRA), or the base comes quantised.
    """
    names = list(model.active_adapters)
    check_sums(model, names)
    whole = held_as(config, load_in_4bit=False, load_in_8bit=False, dtype="float32")
    own = load_weights_config(
        str(config.model_name_or_path), revision=config.model_revision, trust_remote_code=trust_remote_code
    )
    if getattr(own, "quantization_config", None):
        raise UserError("The base comes quantised: it has no 16-bit weights.", where=str(config.model_name_or_path),
                        fix="--mode dequantised")  # fmt: skip
    plain = plain_copy(load_base(whole, trust_remote_code=trust_remote_code), torch.float32)
    plain.generation_config = copy.deepcopy(model.get_base_model().generation_config)  # where it stops is settled there
    for name, layer in adapted(model).items():
        weight = plain.get_parameter(name)
        weight.add_((merged_layer(layer, name, names) - adapted_weight(layer)).to(weight.device))
    return plain.eval()


MODES: dict[str, Callable[[Any, BaseModelConfig, bool], Any]] = {
    "dequantised": dequantised_target,
    "original16": original16_target,
}
ADAPTER = "adapter"
"""The mode that merges nothing: the adapter beside the name of the base that it belongs to."""


def target_of(mode: str, model: Any, config: BaseModelConfig, *, trust_remote_code: bool = False) -> Any:
    """A plain fp32 model with the weights to be shipped.

    Args:
        mode: of `MODES`.
        model: the adapter model.
        config: of its base.
        trust_remote_code: run code that comes with the model.

    Raises:
        UserError: as `check_mode` says.
    """
    check_mode(mode, config)
    return MODES[mode](model, config, trust_remote_code)


def check_mode(mode: str, config: BaseModelConfig) -> None:
    """Refuses weights that there are not.

    Raises:
        UserError: there is no such mode, or the base has no other weights than those that it was trained on.
    """
    if mode not in MODES:
        raise unknown_name("mode", mode, [ADAPTER, *MODES], where="--mode")
    if mode == "original16" and not (config.load_in_4bit or config.load_in_8bit):
        raise UserError("The run's base was not quantised: its own weights are what it was trained on.",
                        where="--mode", fix="--mode dequantised")  # fmt: skip
