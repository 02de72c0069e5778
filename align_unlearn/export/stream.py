"""A merge that never holds the model: each of the base's weight files is read, changed layer by layer, and written.

Peak memory is one weight file and one layer, whatever the model. Every layer is what `modeling/plain.py` makes of a
loaded model, to the bit: quantised and read back as it was trained on, plus the update, rounded once.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from align_unlearn.config import BaseModelConfig
from align_unlearn.errors import UserError
from align_unlearn.files import write_json
from align_unlearn.modeling.adapter_file import Updates, read_updates
from align_unlearn.modeling.earlier import adapter_folder
from align_unlearn.modeling.load import base_folder, compute_dtype

FLOATS = ("F64", "F32", "F16", "BF16")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def weight_files(config: BaseModelConfig) -> list[Path]:
    """The base's safetensors files; empty where it is not a folder of them.

    Raises:
        UserError: one that its index names is not there.
    """
    folder = base_folder(config)
    if (folder / INDEX).is_file():
        named = sorted(set(json.loads((folder / INDEX).read_text("utf-8"))["weight_map"].values()))
        if missing := [name for name in named if not (folder / name).is_file()]:
            raise UserError(f"The base lacks {len(missing)} of {len(named)} files.", where=str(folder / missing[0]),
                            fix="fetch the model again")  # fmt: skip
        return [folder / name for name in named]
    file = folder / WEIGHTS
    return [file] if file.is_file() else []


@contextlib.contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A file of the base's weights.

    Raises:
        UserError: it is torn.
    """
    try:
        weights = safe_open(file, "pt")
    except SafetensorError as error:
        raise UserError(f"The base's weights cannot be read: {error}.", where=str(file),
                        fix="fetch the model again") from error  # fmt: skip
    with weights as read:
        yield read


def held(config: BaseModelConfig, mode: str) -> Callable[[Tensor], Tensor]:
    """A linear layer's weight in fp32, as it was held in training; as it is in the file with `original16`."""
    if mode == "original16":
        return lambda weight: weight.float()
    dtype = compute_dtype(config)
    if not config.load_in_4bit:
        return lambda weight: weight.to(dtype).float()

    def four_bit(weight: Tensor) -> Tensor:
        from bitsandbytes import functional

        codes, state = functional.quantize_4bit(
            weight.to(dtype).contiguous(),
            blocksize=64,
            compress_statistics=bool(config.use_bnb_nested_quant),
            quant_type=config.bnb_4bit_quant_type,
        )
        found: Tensor = functional.dequantize_4bit(codes, state)
        return found.float()

    return four_bit


def base_names(base: Any) -> set[str]:
    """The plain names of the base's own weights."""
    own = [name for name, _ in base.named_parameters() if ".lora_" not in name]
    return {name.replace(".base_layer", "") for name in own}


def can_stream(base: Any, config: BaseModelConfig, updates: Updates | None) -> bool:
    """Whether the files hold the model's weights by its own names, and the update is one that is understood."""
    if updates is None or config.load_in_8bit:
        return False
    known: set[str] = set()
    for file in weight_files(config):
        with opened(file) as weights:
            known |= {key for key in list(weights.keys()) if weights.get_slice(key).get_dtype() in FLOATS}
    named = base_names(base)
    tied = {"lm_head.weight"} if base.config.get_text_config().tie_word_embeddings else set()
    return bool(known) and named - tied <= known and all(f"{name}.weight" in known for name in updates.layers)


@torch.no_grad()
def write_streamed(
    base: Any, config: BaseModelConfig, updates: Updates, folder: Path, dtype: torch.dtype, mode: str
) -> None:
    """Writes the merged weights file by file, under the base's file names, with index and configurations.

    Args:
        base: with adapters on it or without, loaded or as `base_shape` gives it: asked for its shape alone.
        config: of its base.
        updates: of the adapter.
        folder: to write to.
        dtype: of what is written.
        mode: `dequantised` or `original16`.
    """
    head = base.get_output_embeddings()
    quantised = {name.replace(".base_layer", "") for name, module in base.named_modules()
                 if isinstance(module, nn.Linear) and module is not head}  # fmt: skip
    earlier = [found for path in config.after or [] if (found := read_updates(adapter_folder(path))) is not None]
    as_trained, plain = held(config, mode), torch.float32 if mode == "original16" else compute_dtype(config)
    placed, total = {}, 0
    for file in weight_files(config):
        written = {}
        with opened(file) as weights:
            for key in weights.keys():  # noqa: SIM118
                weight, layer = weights.get_tensor(key), key.removesuffix(".weight")
                weight = as_trained(weight) if layer in quantised else weight.to(plain).float()
                for each in (*earlier, updates):
                    if layer in each.layers:
                        weight = weight + each.of(layer)
                written[key] = weight.to(dtype).contiguous()
                placed[key], total = file.name, total + written[key].nbytes
        save_file(written, folder / file.name, metadata={"format": "pt"})
    if set(placed.values()) != {WEIGHTS}:  # else there is nothing that an index would have to say
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": placed})
    shape = base.config.to_dict()
    shape.pop("quantization_config", None)
    type(base.config).from_dict({**shape, "dtype": str(dtype).removeprefix("torch.")}).save_pretrained(folder)
    base.generation_config.save_pretrained(folder)
