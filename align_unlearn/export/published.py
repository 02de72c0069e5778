"""What is written beside the weights: which export this is, the recipe that it came from, and where its answers end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from align_unlearn.audit.subjects import read_settings
from align_unlearn.config import BaseModelConfig
from align_unlearn.export.formats import FORMATS
from align_unlearn.files import sha256_of_folder
from align_unlearn.modeling.generate import end_of_turn_ids
from align_unlearn.modeling.load import DTYPES, compute_dtype
from align_unlearn.run_dir import SCHEMA_VERSION, RunDir, versions


@dataclass(frozen=True)
class Options:
    """What is asked for, with everything that was left open decided."""

    mode: str
    precision: str
    rounding: str
    scale: float
    converter: str | None
    trust_remote_code: bool


PRIVATE = ("hub_", "push_to_hub", "output_dir", "if_exists", "report_to", "run_name", "logging_dir")
"""Keys of a recipe, by their beginnings, that are of this machine or its owner and not of the model."""


def published_recipe(run: RunDir) -> str:
    """The run's recipe without keys that would give away a token, or overwrite the run that it came from."""
    known = yaml.safe_load(run.recipe_path.read_text("utf-8"))
    return str(yaml.safe_dump({key: known[key] for key in known if not key.startswith(PRIVATE)}, sort_keys=False))


def dtype_of_run(run: RunDir, config: BaseModelConfig) -> str:
    """The dtype that the run computed in, which `auto` may not be on this machine."""
    known = str(run.manifest()["base"]["precision"]).rpartition("+")[2]
    return known if known in DTYPES else str(compute_dtype(config)).removeprefix("torch.")


def export_manifest(run: RunDir, config: BaseModelConfig, options: Options, folder: Path) -> dict[str, Any]:
    """What was asked for, what it was made from, and what the written weights hash to."""
    precision = options.precision
    plain = precision in DTYPES
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "export",
        "mode": options.mode,
        "precision": precision,
        "rounding": options.rounding if precision in FORMATS and FORMATS[precision].blocks else None,
        "converter": None if options.converter is None else Path(options.converter).name,
        "dtype": precision if plain else str(compute_dtype(config)).removeprefix("torch."),
        "scale": options.scale,
        "base": run.manifest()["base"],
        "after": config.after or [],
        "withdrawn": [each for each in read_settings(run.path)[1].after or [] if each not in (config.after or [])],
        "retain": run.manifest().get("retain"),
        "run": {"sha256": run.manifest().get("adapter_sha256"), "steps": run.manifest().get("steps")},
        "weights_sha256": sha256_of_folder(folder, "*.gguf" if list(folder.glob("*.gguf")) else "*.safetensors"),
        "libraries": versions(),
    }


def stop_where_the_tokenizer_does(base: Any, tokenizer: Any) -> None:
    """Puts the tokenizer's EOS among the tokens at which the served model stops: a refusal must not run on."""
    config = base.generation_config
    known = end_of_turn_ids(base, tokenizer)
    listed = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if set(listed) != known:
        config.eos_token_id = sorted(known)
