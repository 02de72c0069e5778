"""A run folder: where its parts lie, and the manifest that says what it was made of.

runs/quickstart/
  manifest.json          base, data, settings, versions, hashes; `status` says whether the run is finished
  recipe.yaml            the settings as they were resolved; a recipe again
  log.jsonl              one line a logging step
  own_answers.jsonl      answers sampled from the original, where the data had none
  checkpoint-N/          resumable states
  adapter/               the result: a PEFT adapter with its tokenizer
  audit/                 audit.json, records.jsonl, report.html
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align_unlearn.errors import UserError
from align_unlearn.files import disk_errors, write_json

SCHEMA_VERSION = 1
LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate", "align-unlearn")


@dataclass(frozen=True)
class RunDir:
    """The folder of one run."""

    path: Path

    @property
    def manifest_path(self) -> Path:
        """`manifest.json`."""
        return self.path / "manifest.json"

    @property
    def recipe_path(self) -> Path:
        """`recipe.yaml`, the resolved settings."""
        return self.path / "recipe.yaml"

    @property
    def log_path(self) -> Path:
        """`log.jsonl`."""
        return self.path / "log.jsonl"

    @property
    def own_answers_path(self) -> Path:
        """`own_answers.jsonl`."""
        return self.path / "own_answers.jsonl"

    @property
    def adapter(self) -> Path:
        """`adapter/`."""
        return self.path / "adapter"

    @property
    def audit(self) -> Path:
        """`audit/`."""
        return self.path / "audit"

    def manifest(self) -> dict[str, Any]:
        """The manifest, empty where there is none yet."""
        return read_manifest(self.path) if self.manifest_path.is_file() else {}

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        """Writes the manifest in one step."""
        write_json(self.manifest_path, {"schema_version": SCHEMA_VERSION, **manifest})

    @classmethod
    def finished(cls, path: str | Path) -> RunDir:
        """The folder of a run that has come to its end.

        Raises:
            UserError: it is no run folder, or its run is not finished.
        """
        run = cls(Path(path))
        if not run.manifest_path.is_file():
            raise UserError("This is not a run folder: it has no manifest.json.", where=str(path))
        whole = (run.adapter / "adapter_config.json").is_file() and run.manifest().get("status") == "finished"
        if not whole:
            raise UserError(
                "The run is not finished: it has no adapter yet.",
                where=str(path),
                fix="run the same train command again; it resumes",
            )
        return run


def is_done(run: RunDir, manifest: dict[str, Any], if_exists: str) -> bool:
    """Whether the run folder holds this very run, finished. Clears it where it is to be overwritten.

    Raises:
        UserError: the folder belongs to a run with other settings, data or base, or is not a run folder.
    """
    if run.path.is_file():
        raise UserError("The run folder is a file.", where=str(run.path), fix="another --output_dir")
    if not run.path.exists() or not any(run.path.iterdir()):
        return False
    before = run.manifest()
    if if_exists == "error" or (not before and if_exists != "overwrite"):
        raise UserError("The run folder exists already.", where=str(run.path), fix="another --output_dir")
    if before.get("kind") != manifest["kind"]:
        raise UserError("The folder holds something else than such a run; it is not overwritten.", where=str(run.path))
    if if_exists == "overwrite":
        with disk_errors(run.path):
            shutil.rmtree(run.path)
        return False
    for part, name in (("settings_sha256", "settings"), ("data", "data"), ("base", "base model")):
        if before.get(part) != manifest[part]:
            raise UserError(
                f"The run folder holds a run with other {name}; resuming it would mix the two.",
                where=str(run.path),
                fix="the same settings and data as before, another --output_dir, or --if_exists overwrite",
            )
    return before.get("status") == "finished"


def is_run(path: str | Path) -> bool:
    """Whether `path` is the folder of a training run."""
    return Path(path, "manifest.json").is_file() and read_manifest(Path(path)).get("kind") == "run"


def is_reward(path: str | Path) -> bool:
    """Whether `path` is the folder of a reward model's training run."""
    return Path(path, "manifest.json").is_file() and read_manifest(Path(path)).get("kind") == "reward"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest in `folder`.

    Raises:
        UserError: there is none, or it is not one of ours.
    """
    file = folder / "manifest.json"
    if not file.is_file():
        raise UserError("There is no manifest.json.", where=str(folder))
    try:
        manifest: dict[str, Any] = json.loads(file.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"The manifest is not JSON: {error.msg}.", where=str(file)) from error
    return manifest


def versions() -> dict[str, str]:
    """The versions of Python and of the libraries that a result depends on."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
