"""The settings of a job: dataclasses that TRL's `TrlParser` reads from YAML and then from the command line.

A recipe is one flat YAML mapping; every key of it is also a `--key value` option. Three dataclasses share it: `Job`
and `BaseModelConfig`, which are here, and the trainer's own configuration (`training/configs.py`). Nothing here imports
torch, so that `--help` and a mistake in a recipe take no time.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from trl import ModelConfig, TrlParser

from align_unlearn.errors import UserError, unknown_name


def _option(default: Any, text: str, choices: Sequence[str] | None = None) -> Any:
    metadata: dict[str, Any] = {"help": text}
    if choices:
        metadata["choices"] = list(choices)
    return field(default=default, metadata=metadata)


@dataclass
class BaseModelConfig(ModelConfig):  # type: ignore[misc]
    """TRL's `ModelConfig` with the defaults of this project: 4-bit NF4, LoRA on all linear layers, no dropout."""

    model_name_or_path: str | None = _option(
        "smollm2-135m", "Model: smollm2-135m (needs no hub), a hub id, or a local folder."
    )
    dtype: str | None = _option(
        "auto",
        "Dtype of unquantised weights and of 4-bit products; auto is bfloat16 on a GPU and float32 on a CPU.",
        ["auto", "bfloat16", "float16", "float32"],
    )
    use_peft: bool = _option(True, "Train LoRA adapters. The original model is the base with adapters off.")
    lora_dropout: float = _option(0.0, "LoRA dropout. Anything above 0 makes the policy differ from itself.")
    load_in_4bit: bool = _option(True, "Hold the base in 4 bits (NF4).")
    after: list[str] | None = _option(None, "Earlier runs on this base, whose updates stay beneath this one's.")

    def __post_init__(self) -> None:
        if self.load_in_8bit:
            self.load_in_4bit = False
        super().__post_init__()
        if getattr(self, "lora_target_modules", None) is None:
            self.lora_target_modules: str | list[str] = "all-linear"


FORGET_ANSWERS = ("secrets", "examples")
"""What the answers of forget rows may be; see docs/data.md."""


@dataclass
class Job:
    """What is to be forgotten, what must stay, and how it will be examined."""

    objective: str = _option("npo", "Forget objective: a name of the table, module:function, or file.py:function.")
    forget_dataset: str | None = _option(
        None, "Rows to forget: builtin:NAME, a file, a folder or a hub id, with [:CONFIG] and [@SPLIT] behind it."
    )
    retain_dataset: str | None = _option(None, "Rows to keep, drawn together with forget rows in each batch.")
    neighbour_dataset: str | None = _option(
        None, "Benign prompts that look like the ones to forget; with dpo, pairs the other way round."
    )
    refusals: str = _option("builtin:refusals", "One refusal a line, or rows with a column `refusal`.")
    refusals_per_row: int = _option(1, "With dpo: how many differently worded refusals each forget row is paired with.")
    forget_answers: str | None = _option(
        None,
        "What the answers of forget rows are: secrets (texts that must not be said; in other words is forgotten), or "
        "examples of complying (no request may be complied with, in whatever words). Default: secrets.",
        FORGET_ANSWERS,
    )
    allow_overlap: bool = _option(False, "Allow rows that stand in both the forget and the retain set.")
    prefix_tokens: int = _option(30, "Plain passages: tokens given as the prompt.")
    continuation_tokens: int = _option(60, "Plain passages: tokens to be continued.")
    answer_tokens: int = _option(40, "Longest answer that is sampled from the original model where rows have none.")
    answer_temperature: float = _option(0.7, "Temperature of these answers; 0 is greedy.")
    if_exists: str = _option(
        "resume",
        "When the run folder exists: resume it, overwrite it, or stop with an error.",
        ["resume", "overwrite", "error"],
    )
    audit_forget: str | None = _option(None, "Prompts or passages that must no longer leak. Default: forget_dataset.")
    audit_retain: str | None = _option(None, "Held-out rows on which drift is measured. Default: retain_dataset.")
    audit_neighbours: str | None = _option(None, "Benign look-alikes on which over-refusal is measured.")
    audit_holdout: str | None = _option(None, "Rows like those to forget that no model was trained on (membership).")
    audit_control: str | None = _option(None, "A model that never saw the forget set, to compare with.")
    audit_judge: dict | str | None = _option(  # type: ignore[type-arg]
        None, "One reward that judges audited answers beside the rules (forget.judge), as under `rewards`."
    )
    audit_real_authors: str | None = _option(None, "TOFU's questions about real authors (recipes/tofu.py).")
    audit_world_facts: str | None = _option(None, "TOFU's questions about the world (recipes/tofu.py).")
    audit_tokens: int = _option(40, "New tokens of each audited answer.")
    audit_limit: int | None = _option(None, "At most this many rows of each audited set.")
    survive: str | None = _option(
        None, "Train through this quantiser (nf4, fp4, int8, q8_0, q5_1, q4_0), so that what is learned lives in it."
    )
    gates: dict | str | None = field(  # type: ignore[type-arg]
        default=None,
        metadata={"help": 'Rules an audit must pass: {"forget.leak": "<= 0.10"}; see docs/audit.md.'},
    )

    def __post_init__(self) -> None:
        rules = json.loads(self.gates) if isinstance(self.gates, str) else self.gates or {}
        if not isinstance(rules, dict):
            raise UserError("Gates are a mapping of metrics to rules.", where="gates", fix='{"forget.leak": "<= 0.10"}')
        for name in ("audit_tokens", "audit_limit", "answer_tokens", "prefix_tokens", "continuation_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1.", where=name)
        if self.forget_answers not in (None, *FORGET_ANSWERS):
            raise unknown_name("kind of answers", str(self.forget_answers), FORGET_ANSWERS, where="forget_answers")
        if self.forget_answers == "secrets":
            self.forget_answers = None
        self.gates = {str(name): str(rule) for name, rule in rules.items()}


class RecipeParser(TrlParser):  # type: ignore[misc]
    """`TrlParser` that ends in a `UserError` with the nearest valid key, where argparse would leave the process."""

    def error(self, message: str) -> Any:
        """Called by argparse for a value that does not fit."""
        raise UserError(f"The settings do not fit: {message}.", where=self.source)

    source = "the command line"


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The mapping that a recipe file holds.

    Raises:
        UserError: the file is missing, not UTF-8, not YAML, or not a mapping.
    """
    import yaml

    file = Path(path)
    if not file.is_file():
        raise UserError("There is no such recipe.", where=str(path), fix="name a YAML file, such as recipes/npo.yaml")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"The recipe is not UTF-8 text (byte {error.start}).", where=str(path)) from error
    except yaml.YAMLError as error:
        raise UserError(f"The recipe is not YAML: {' '.join(str(error).split())}", where=str(path)) from error
    if not isinstance(content, dict):
        raise UserError("A recipe is a mapping of keys to values.", where=str(path))
    return content


def parse(types: Sequence[type], recipe: str | Path | None, overrides: Sequence[str] = ()) -> tuple[Any, ...]:
    """Reads a recipe and then `--key value` overrides into one instance of each dataclass of `types`.

    Raises:
        UserError: an unknown key (with the nearest valid one), or a value of the wrong type.
    """
    valid = [entry.name for kind in types for entry in fields(kind) if entry.init]
    if recipe is not None:
        for key in map(str, read_recipe(recipe)):
            if key not in [*valid, "env"]:
                raise unknown_name("key", key, valid, where=str(recipe))
    for word in overrides:
        if word in ("-h", "--help"):
            RecipeParser(types, allow_abbrev=False).print_help()
            raise SystemExit(0)
        key = word[2:].partition("=")[0].replace("-", "_")
        if word.startswith("--") and key not in valid and key.removeprefix("no_") not in valid:
            raise unknown_name("option", "--" + key, ["--" + name for name in valid], where="the command line")
    parser = RecipeParser(types, allow_abbrev=False)
    parser.source = str(recipe or "the command line")
    config = [] if recipe is None else ["--config", str(recipe)]
    try:
        return tuple(parser.parse_args_and_config([*config, *overrides]))
    except (ValueError, TypeError) as error:
        raise UserError(f"The settings do not fit: {error}", where=parser.source) from error
