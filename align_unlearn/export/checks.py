"""What is refused before a merge begins: options that cannot be, adapters that do not belong, a disk without room."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from align_unlearn.config import BaseModelConfig
from align_unlearn.errors import UserError, unknown_name
from align_unlearn.export.formats import FORMATS
from align_unlearn.export.packed import GGUF
from align_unlearn.export.rounded import check_rounding
from align_unlearn.export.targets import ADAPTER, MODES
from align_unlearn.modeling.load import DTYPES
from align_unlearn.modeling.round_trip import linear_layers
from align_unlearn.run_dir import RunDir


def kept_beneath(run: RunDir, config: BaseModelConfig, adapters: Sequence[str]) -> list[str]:
    """Those of the earlier runs that are named; the run itself goes in, named or not.

    Raises:
        UserError: one is named that the run does not stand on.
    """
    known = {Path(path).resolve(): path for path in config.after or []}
    named = {Path(path).resolve() for path in adapters}
    if strangers := [str(path) for path in adapters if Path(path).resolve() not in {*known, run.path.resolve()}]:
        raise UserError("The run does not stand on this one.", where=f"--adapters {strangers[0]}",
                        fix=f"it stands on: {', '.join(config.after or []) or 'none'}")  # fmt: skip
    return [path for place, path in known.items() if place in named]


def check_options(mode: str, precision: str | None, rounding: str | None, dtype: str | None, scale: float) -> None:
    """Refuses what cannot be done, before anything is loaded.

    Raises:
        UserError: an option is unknown, or two do not go together.
    """
    if mode not in (ADAPTER, *MODES):
        raise unknown_name("mode", mode, [ADAPTER, *MODES], where="--mode")
    if precision is not None and precision not in FORMATS:
        raise unknown_name("precision", precision, FORMATS, where="--precision")
    if rounding is not None:
        check_rounding(precision or dtype or "the dtype of the run", rounding)
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"Unknown dtype '{dtype}'.", where="--dtype", fix=f"one of: {', '.join(DTYPES)}")
    if dtype is not None and precision is not None:
        raise UserError("A quantised folder has no dtype of its own.", where="--dtype", fix="leave --dtype out")
    if not math.isfinite(scale):
        raise UserError(f"The update cannot be multiplied by {scale}.", where="--scale", fix="a number, such as 0.5")


def check_converter(converter: str | None, precision: str | None) -> None:
    """Refuses a converter that is not there, or that has nothing to do.

    Raises:
        UserError: as said.
    """
    if converter is None:
        return
    if not Path(converter).is_file():
        raise UserError("There is no such converter.", where=f"--converter {converter}")
    if precision not in GGUF:
        raise UserError(f"The converter writes GGUF, not {precision or 'safetensors'}.", where="--converter",
                        fix=f"--precision, one of: {', '.join(GGUF)}")  # fmt: skip


READ_BACK = ("query_pre_attn_scalar", "layer_types", "rms_norm_eps", "head_dim", "hidden_act", "hidden_activation")
"""Settings that change what a model computes and that a GGUF file, or transformers as it reads one, may leave out.

A sliding window is none of them: it changes nothing for texts that are shorter.
"""
CAPS = ("final_logit_softcapping", "attn_logit_softcapping")
"""Likewise; none means that there is none."""


def check_read_back(found: Any, wanted: Any) -> None:
    """Refuses a GGUF file that transformers takes for another model than the one that was written.

    What is asked of the file is asked through transformers; llama.cpp may read more of it, and then serves something
    else than what was asked.

    Args:
        found: the model that was read.
        wanted: the one that was written.

    Raises:
        UserError: a setting or the positions differ; it is named.
    """
    configs = [model.config.get_text_config() for model in (found, wanted)]
    for name in (*READ_BACK, *CAPS):
        read, written = (getattr(config, name, None) for config in configs)
        if read != written and (written is not None or name in CAPS) and not _close(read, written):
            raise _misread(f"{name} {read}", f"{written}")
    turns = [_rotations(model) for model in (found, wanted)]
    for name, own in turns[1].items():
        if name not in turns[0] or turns[0][name].shape != own.shape or not torch.allclose(turns[0][name], own):
            raise _misread("other positions", "its own (rope_parameters)")


def _misread(found: str, wanted: str) -> UserError:
    return UserError(f"Read back, the file has {found}, and the model {wanted}: it cannot be checked here.",
                     where="--precision", fix="a precision that is no GGUF")  # fmt: skip


def _close(found: Any, wanted: Any) -> bool:
    numbers = all(isinstance(each, (int, float)) for each in (found, wanted))
    return numbers and math.isclose(found, wanted, rel_tol=1e-5)


def _rotations(model: Any) -> dict[str, torch.Tensor]:
    """By name, the frequencies of the rotations that positions are."""
    named = model.named_buffers()
    return {name: own.cpu() for name, own in named if name.endswith("inv_freq") and "original" not in name}


def check_room(base: Any, precision: str, target: Path, converter: str | None) -> None:
    """Refuses a destination without room, before anything is written.

    Args:
        base: with adapters on it or without, loaded or as `base_shape` gives it.
        precision: of `FORMATS`.
        target: the destination.
        converter: llama.cpp's, where it is to write.

    Raises:
        UserError: the disk has less free than the weights will take. What is no linear layer (embeddings, the experts
            of a mixture) takes 16 bits in a GGUF file, in a pre-quantised folder up to 32.
    """
    adapters = sum(each.numel() for name, each in base.named_parameters() if "lora_" in name)
    total = base.num_parameters(exclude_embeddings=False) - adapters
    rounded = sum(each.in_features * each.out_features for name, each in linear_layers(base).items()
                  if "lora_" not in name)  # fmt: skip
    # the library rounds an unquantised folder as it loads it; a converter reads one and writes a file of 16 bits
    passing = 4 * total if precision == "int8" else 6 * total if converter else 0
    bits = FORMATS[precision].bits
    whole = 32 if precision in ("nf4", "fp4", "int8") else max(16, bits)
    needed = passing + rounded * bits // 8 + (total - rounded) * whole // 8
    check_free(needed, target)


def check_free(needed: int, target: Path) -> None:
    """Refuses a destination on a disk with less than so many bytes free.

    Raises:
        UserError: there is less.
    """
    place = next(each for each in (target, *target.resolve().parents) if each.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(f"The export needs about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free.",
                        where=str(target), fix="free some space, or name another place")  # fmt: skip
