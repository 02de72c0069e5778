"""Merging: de-quantise, add the adapter, write safetensors. Never into 4-bit weights in place.

A merge into NF4 codes changes none of them: an unlearning update is far smaller than half a quantisation step, so that
the model as it was comes back. Here every layer is de-quantised in fp32 (exactly what the adapter was trained on), the
adapter's update is added in fp32, and the sum is rounded once, to the dtype that is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from align_unlearn.audit.subjects import load_adapter, read_settings
from align_unlearn.errors import UserError
from align_unlearn.export.card import model_card
from align_unlearn.export.verify import Parity, require_parity
from align_unlearn.files import new_folder, sha256_of_folder, write_json, write_text
from align_unlearn.modeling.load import DTYPES, compute_dtype
from align_unlearn.modeling.plain import check_whole, empty_plain, merged_weights
from align_unlearn.run_dir import SCHEMA_VERSION, RunDir, versions


def merge(
    run_path: str | Path,
    to: str | Path,
    *,
    dtype: str | None = None,
    scale: float = 1.0,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = print,
) -> tuple[Path, Parity]:
    """Writes the run's model as a plain folder at `to`, once it has been shown to be the same model.

    Args:
        run_path: a finished run.
        to: a new or empty folder; nothing is left there if the merge fails.
        dtype: `float32`, `bfloat16` or `float16`; the dtype that the run computed in, where none is given.
        scale: what the adapter's update is multiplied by (task arithmetic: less forgets less, more forgets more).
        trust_remote_code: run code that comes with the model.
        say: called with a line for each stage.

    Returns:
        The folder, and how closely it agrees with the adapter model.

    Raises:
        UserError: the run is not finished, the base is another, the destination is not empty, the disk is full, or the
            written folder does not give the adapter model's answers; or the scale is no number.
    """
    run = RunDir.finished(run_path)
    job, config = read_settings(run.path)
    target = Path(to)
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"Unknown dtype '{dtype}'.", where="--dtype", fix=f"one of: {', '.join(DTYPES)}")
    if not math.isfinite(scale):
        raise UserError(f"The update cannot be multiplied by {scale}.", where="--scale", fix="a number, such as 0.5")
    written = DTYPES[dtype] if dtype else compute_dtype(config)
    with new_folder(target) as folder:
        say(f"loading {run.adapter} on {config.model_name_or_path}")
        model, tokenizer = load_adapter(run, config, trust_remote_code=trust_remote_code)
        scale_update(model, scale)
        say(f"merging in fp32, writing {str(written).removeprefix('torch.')}")
        save_plain(model, folder, written)
        tokenizer.save_pretrained(folder)
        write_text(folder / "recipe.yaml", run.recipe_path.read_text("utf-8"))
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "kind": "export",
            "dtype": str(written).removeprefix("torch."),
            "scale": scale,
            "base": run.manifest()["base"],
            "retain": run.manifest().get("retain"),
            "run": {"sha256": run.manifest().get("adapter_sha256"), "steps": run.manifest().get("steps")},
            "weights_sha256": sha256_of_folder(folder),
            "libraries": versions(),
        }
        write_json(folder / "manifest.json", manifest)
        say("loading the written folder afresh and comparing it with the adapter model")
        parity = require_parity(model, tokenizer, folder, written, job, trust_remote_code=trust_remote_code)
        write_json(folder / "manifest.json", manifest | {"parity": parity.described()})
        write_text(folder / "README.md", model_card(run, manifest, parity))
    say(f"merged model in {target}")
    return target, parity


def scale_update(model: Any, scale: float) -> None:
    """Multiplies the update of every LoRA layer: W + s·ΔW."""
    if scale == 1.0:
        return
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.scaling = {adapter: scale * value for adapter, value in module.scaling.items()}


def save_plain(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """Writes a PEFT model as a plain transformers folder: weights merged, no trace of adapter or quantisation."""
    base = model.get_base_model()
    plain = empty_plain(base, dtype)
    weights = merged_weights(model, dtype)
    check_whole(plain, weights)
    expected = set(plain.state_dict())
    plain.generation_config = base.generation_config
    plain.save_pretrained(folder, state_dict={name: weights[name] for name in weights if name in expected})
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)
