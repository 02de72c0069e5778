"""What an export passes on as the base has it, byte for byte: tokenizer, chat template, generation config.

What is read and written again is in the writer's version and order; a tokenizer that serves is not to change because a
weight did.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from align_unlearn.config import BaseModelConfig
from align_unlearn.files import write_json
from align_unlearn.modeling.load import base_folder

TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken",
    "tokenization*.py", "chat_template*", "additional_chat_templates",
)  # fmt: skip
GENERATION = "generation_config.json"


def pass_on_tokenizer(config: BaseModelConfig, tokenizer: Any, folder: Path) -> None:
    """Puts the base's own tokenizer files into the folder, or the tokenizer as it was loaded where there are none."""
    base = base_folder(config)
    files = sorted({file for pattern in TOKENIZER for file in base.glob(pattern)}) if base.is_dir() else []
    if not any(file.name.startswith("tokenizer") for file in files):
        tokenizer.save_pretrained(folder)
        return
    for file in files:
        if file.is_dir():
            shutil.copytree(file, folder / file.name, dirs_exist_ok=True)
        else:
            shutil.copyfile(file, folder / file.name)


def pass_on_code(config: BaseModelConfig, folder: Path) -> None:
    """Puts the base's own modules into the folder, which its configurations name."""
    for file in base_folder(config).glob("*.py"):
        shutil.copyfile(file, folder / file.name)


def leave_code_out(folder: Path) -> None:
    """Takes out of a folder what has other programs run code that came with the base."""
    for file in folder.glob("*.py"):
        file.unlink()
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            known = json.loads((folder / name).read_text("utf-8"))
            write_json(folder / name, {key: value for key, value in known.items() if key != "auto_map"})


def pass_on_generation_config(config: BaseModelConfig, folder: Path) -> None:
    """Puts the base's own generation config in the place of the written one, where both say the same."""
    base, written = base_folder(config) / GENERATION, folder / GENERATION
    if base.is_file() and written.is_file() and _said(base) == _said(written):
        shutil.copyfile(base, written)


def _said(file: Path) -> dict[str, Any]:
    known: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return {name: value for name, value in known.items() if name not in ("transformers_version", "_from_model_config")}
