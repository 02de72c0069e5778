"""From a recipe to an online trainer: prompts of every kind in one data set, each with the rewards that apply."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from pyarrow import ArrowException

from align_unlearn.data.examples import Example, as_requests
from align_unlearn.errors import UserError
from align_unlearn.files import sha256_of, sha256_of_file, sha256_of_folder
from align_unlearn.modeling.load import lora_config
from align_unlearn.run_dir import RunDir, is_reward
from align_unlearn.training.online import OnlineGRPOTrainer, OnlineRLOOTrainer, OnlineTrainer
from align_unlearn.training.ppo import PPOTrainer
from align_unlearn.training.recipe import REWARD_KEYS
from align_unlearn.training.rows import JobData, asked_rows, retain_rows

TAKEN = frozenset({"kind", "reference", "plain", "completion", "completions", "completion_ids"})
"""Names that a reward is given something else under."""
LONGEST_PATH = 200
"""Characters; what is longer is a rubric or the like, and no file is looked for."""
ONLINE_TRAINERS: dict[str, Any] = {"ppo": PPOTrainer, "rloo": OnlineRLOOTrainer, "grpo": OnlineGRPOTrainer}
"""The trainer of each online objective."""


def build_online_trainer(recipe: Any, data: JobData, model: Any, tokenizer: Any) -> OnlineTrainer:
    """The trainer of an online recipe.

    Raises:
        UserError: prompts are text in one set and messages in another; no reward applies to a set.
    """
    args = recipe.args
    if recipe.job.forget_answers == "examples":
        data = replace(data, forget=as_requests(data.forget))
    trainer: OnlineTrainer = ONLINE_TRAINERS[recipe.job.objective](
        model,
        args,
        train_dataset=prompt_rows(data, args),
        retain_dataset=retain_rows(data.retain, tokenizer, None),
        processing_class=tokenizer,
        peft_config=lora_config(recipe.model),
    )
    return trainer


def online_hashes(recipe: Any, base: dict[str, Any]) -> dict[str, str]:
    """Hashes of what an online run takes from elsewhere: the adapter it starts from, what its rewards are made with.

    Raises:
        UserError: such a run is not finished, or has another base.
    """
    if recipe.job.objective not in ONLINE_TRAINERS:
        return {}
    args, found = recipe.args, {}
    if args.start_from:
        start = RunDir.finished(args.start_from)
        if start.manifest()["base"]["sha256"] != base["sha256"]:
            raise UserError("The run to start from has another base.", where=f"start_from {args.start_from}")
        found["start_from"] = sha256_of_folder(start.adapter)
    for key in REWARD_KEYS:
        for spec in args.specs(key):
            for name, value in spec.kwargs.items():
                content = _content(value)
                if content is not None:
                    found[f"{key}.{spec.name}" + ("" if name == "path" else f".{name}")] = content
    return found


def _content(value: Any) -> str | None:
    """A hash of what an argument of a reward names: a reward model made here, the files of a folder, or a file."""
    if not isinstance(value, str) or not 0 < len(value) < LONGEST_PATH or not Path(value).exists():
        return None
    if is_reward(value):
        return sha256_of_folder(RunDir.finished(value).adapter)
    place = Path(value)
    files = [place] if place.is_file() else [file for file in sorted(place.iterdir()) if file.is_file()]
    return sha256_of({file.name: sha256_of_file(file) for file in files})


def prompt_rows(data: JobData, args: Any) -> Dataset:
    """Prompts to forget, near them, and of everyday, with their kind and what must not be said.

    Retain rows are asked too where a reward names them; their exact KL is held either way. Neighbours' is not: tried,
    refusals of requests went with those of look-alikes (benchmarks/README.md). The rows' other columns stand beside,
    none where a row lacks them, for rewards to be given by name.

    Raises:
        UserError: prompts are text in one set and messages in another, or a column's values are of several types.
    """
    rows = [_row(example, kind) for kind, examples in asked_rows(data, args).items() for example in examples]
    if len({isinstance(row["prompt"], str) for row in rows}) > 1:
        raise UserError(
            "Some prompts are plain text and some are messages.",
            where="forget_dataset / neighbour_dataset / retain_dataset",
            fix="one form in all of them: text, or messages (question/answer rows are messages)",
        )
    names = sorted({name for row in rows for name in row})
    try:
        return Dataset.from_list([{name: row.get(name) for name in names} for row in rows])
    except ArrowException as error:
        raise UserError(
            f"A column's values are of several types: {error}",
            where="forget_dataset / neighbour_dataset / retain_dataset",
            fix="one type in each column, or leave the column out",
        ) from error


def _row(example: Example, kind: str) -> dict[str, Any]:
    reference = example.completion if kind == "forget" else None
    others = {name: value for name, value in example.columns.items() if name not in TAKEN}
    return {"prompt": example.prompt, "kind": kind, "reference": reference, "id": example.id, **others}
