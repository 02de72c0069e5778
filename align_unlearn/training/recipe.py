"""A recipe, read and resolved: the job, the base model, and the configuration of the trainer that does it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from align_unlearn.config import BaseModelConfig, Job, parse, read_recipe
from align_unlearn.errors import UserError
from align_unlearn.files import sha256_of, sha256_of_file, write_text
from align_unlearn.objectives.table import ONLINE, TRAINERS, bind, check_needs, forget_objective
from align_unlearn.training.configs import (
    PREFERENCE_CONFIGS,
    RefusalDPOConfig,
    RefusalKTOConfig,
    UnlearnConfig,
    changed_settings,
)
from align_unlearn.training.online_configs import ONLINE_CONFIGS, OnlineGRPOConfig, OnlineRLOOConfig, PPOConfig
from align_unlearn.training.retain_term import check_retain_settings

TrainerConfig = UnlearnConfig | RefusalDPOConfig | RefusalKTOConfig | PPOConfig | OnlineRLOOConfig | OnlineGRPOConfig

REWARD_KEYS = ("rewards", "costs", "heldout_judge")
"""Keys of an online recipe that name reward models."""
VOLATILE = frozenset(
    "if_exists output_dir report_to logging_dir run_name resume_from_checkpoint disable_tqdm gates".split()
)
"""Keys that may differ between a run and its resumption, and all that begin with `audit_`."""


@dataclass(frozen=True)
class Recipe:
    """The three parts of a recipe."""

    job: Job
    model: BaseModelConfig
    args: TrainerConfig

    def settings(self) -> dict[str, Any]:
        """Every key of the job and the model, and the trainer's keys that are not at their default."""
        changed = changed_settings(self.args)
        everything = {**vars(self.job), **_fields(self.model), **changed, "output_dir": self.args.output_dir}
        return {name: _plain(value) for name, value in everything.items() if value is not None or name in changed}

    def identity(self) -> str:
        """A hash of what the result depends on: the same identity on the same data gives the same adapter."""
        kept = {
            name: value
            for name, value in self.settings().items()
            if name not in VOLATILE and not name.startswith("audit_")
        }
        if self.job.objective not in ONLINE:
            kept.pop("forget_answers", None)  # of rollouts and audits alone
        files = [Path(place) for place in map(_place, self._named_code()) if place.endswith(".py")]
        code = [
            sha256_of_file(file) for file in files if file.is_file()
        ]  # one that is missing is missed where it is used
        return sha256_of([kept, code])

    def _named_code(self) -> list[str]:
        """Every `module:name` or `file.py:name` of the recipe."""
        rewards = [each for key in REWARD_KEYS if hasattr(self.args, key) for each in self.args.specs(key)]
        return [self.job.objective, *(spec.model for spec in rewards)]

    def write(self, path: Path) -> None:
        """Writes the settings as a recipe."""
        write_text(path, yaml.safe_dump(self.settings(), sort_keys=True, allow_unicode=True))


def load_recipe(path: str | Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe with overrides, and refuses what cannot work before any weight is loaded.

    Args:
        path: a YAML file, or none for defaults and overrides alone.
        overrides: `["--learning_rate", "1e-4", …]`.

    Raises:
        UserError: an unknown key, objective or hyper-parameter, or a value that does not fit.
    """
    objective = _objective(path, overrides)
    kind: Any = {**PREFERENCE_CONFIGS, **ONLINE_CONFIGS}.get(objective, UnlearnConfig)
    if objective not in TRAINERS:
        entry = forget_objective(objective)
    named = any(word.partition("=")[0] in ("--output_dir", "--output-dir") for word in overrides)
    given = {} if path is None else read_recipe(path)
    if not named and "output_dir" not in given:
        overrides = [*overrides, "--output_dir", f"runs/{Path(path).stem if path else objective}"]
    job, model, args = parse([Job, BaseModelConfig, kind], path, overrides)
    if not model.use_peft:
        raise UserError(
            "Unlearning trains adapters: without one there is no original to hold the model near.",
            where="use_peft",
            fix="leave use_peft on; to teach a model in full there is recipes/finetune.py",
        )
    check_retain_settings(str(args.retain or ("kl" if objective in TRAINERS else entry.retain)), args)
    scale = args.extrapolate * (1.0 if objective in TRAINERS else entry.sign)
    if scale != 1.0 and (model.use_dora or model.lora_modules_to_save):
        raise UserError(
            f"What is saved at {scale} times its size must be a plain LoRA update.",
            where="use_dora / lora_modules_to_save",
            fix="leave these out, or extrapolate 1 and another objective than negate",
        )
    if scale != 1.0 and job.survive:
        raise UserError(
            f"What was trained through {job.survive} is rounded otherwise at {scale} times its size.",
            where="survive",
            fix="--extrapolate 1, and another objective than negate",
        )
    if isinstance(args, (PPOConfig, OnlineRLOOConfig, OnlineGRPOConfig)):
        args.check_rewarded()
    if isinstance(args, UnlearnConfig):
        bind(entry, objective, args.hyper_parameters())
        check_needs(entry, objective, args)
    return Recipe(job, model, args)


def _objective(path: str | Path | None, overrides: Sequence[str]) -> str:
    """The objective decides which trainer's keys are valid, so it is looked up first."""
    words = list(overrides)
    for at, word in enumerate(words):
        if word == "--objective" and at + 1 < len(words):
            return words[at + 1]
        if word.startswith("--objective="):
            return word.partition("=")[2]
    found = None if path is None else read_recipe(path).get("objective")
    return str(found or Job.objective)


def _place(name: str) -> str:
    return name.rpartition(":")[0]


def _fields(config: Any) -> dict[str, Any]:
    return {entry.name: getattr(config, entry.name) for entry in fields(config)}


def _plain(value: Any) -> Any:
    """Enums of transformers as their values; the rest as it is."""
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return getattr(value, "value", value)
