"""A LoRA adapter as it lies on the disk: which layers it changes, by which factor, and its two matrices of each."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from align_unlearn.errors import UserError

PLAIN = {"peft_type": "LORA", "use_dora": False, "lora_bias": False, "fan_in_fan_out": False, "bias": "none"}
"""What an adapter's configuration must say for its update to be scale · B A and nothing else."""
EMPTY = (
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
)


@dataclass(frozen=True)
class Updates:
    """An adapter's updates as they lie in its file.

    Attributes:
        file: the adapter's weights.
        layers: plain names of the layers that it changes, each with the factor of its update.
    """

    file: Path
    layers: dict[str, float]

    def factors(self, layer: str) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) in fp32."""
        with safe_open(self.file, "pt") as weights:
            a, b = (weights.get_tensor(f"base_model.model.{layer}.lora_{each}.weight").float() for each in "AB")
        return a, b

    def of(self, layer: str) -> Tensor:
        """scale · B A in fp32, (out, in)."""
        a, b = self.factors(layer)
        update: Tensor = self.layers[layer] * (b @ a)
        return update


def read_updates(adapter: Path, scale: float = 1.0) -> Updates | None:
    """The updates of a LoRA adapter (rsLoRA, and ranks and alphas by layer, included); none for other kinds.

    Raises:
        UserError: its weights are torn.
    """
    config = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    if any(config.get(name, value) != value for name, value in PLAIN.items()) or any(
        config.get(name) for name in EMPTY
    ):
        return None
    file = adapter / "adapter_model.safetensors"
    try:
        with safe_open(file, "pt") as weights:
            keys = list(weights.keys())
            names = {key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): weights.get_slice(key)
                     for key in keys if key.endswith(".lora_A.weight")}  # fmt: skip
            ranks = {name: each.get_shape()[0] for name, each in names.items()}
            whole = 2 * len(names) == len(keys)
    except SafetensorError as error:
        raise UserError(f"The adapter's weights cannot be read: {error}.", where=str(file)) from error
    if not whole:
        return None
    layers = {}
    for name, rank in ranks.items():
        alpha = _by_pattern(config.get("alpha_pattern") or {}, name, config["lora_alpha"])
        layers[name] = scale * alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Updates(file, layers)


def _by_pattern(patterns: dict[str, float], name: str, default: float) -> float:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)
