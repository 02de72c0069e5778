"""Scoring that fails loudly: a crash, a score that is not a number, a wrong length or a time-out names its row.

A reward that quietly turns failures into zeros teaches the policy to make the reward fail.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from align_unlearn.data.examples import Messages
from align_unlearn.data.exchange import plain_prompt
from align_unlearn.errors import UserError
from align_unlearn.rewards.deadline import within
from align_unlearn.rewards.load import RewardSpec
from align_unlearn.rewards.protocol import RewardModel

LARGEST = 1e6
"""A score beyond it is a sentinel or a mistake."""
SHOWN = 80
"""Characters of a prompt or completion that an error shows."""


def scored(
    spec: RewardSpec,
    model: RewardModel,
    prompts: list[Messages],
    completions: list[str],
    columns: dict[str, list[Any]],
) -> list[float | None]:
    """What `model` says of each row, times the `sign` that the recipe gives it.

    Args:
        spec: the recipe's entry: its name for errors, its time-out and its sign.
        columns: the other columns, a list each.

    Raises:
        UserError: as the module says, with the row.
    """
    if not prompts:
        return []
    name, timeout = spec.name, spec.timeout
    try:
        found = within(timeout, lambda: model.score(prompts, completions, **columns))
    except UserError as error:
        at = _poison(model, prompts, completions, columns, timeout)
        rows = f"a batch of {len(prompts)} rows" if at is None else _shown_row(prompts[at], completions[at], at)
        where = ", ".join(filter(None, (f"reward {name}", rows, error.where)))
        raise UserError(error.problem, where=where, fix=error.fix) from error
    except TimeoutError as error:
        fix = f"a longer timeout, or a faster reward; the batch had {len(prompts)} rows"
        what = f"gave no answer in {timeout} s"
        at, tried = _guilty(model, prompts, completions, columns, timeout)
        if at is None:
            where = f"a batch of {len(prompts)} rows, the first {tried} of which it answers alone"
            raise UserError(f"The reward '{name}' {what}.", where=where, fix=fix) from error
        raise _row_error(name, what, prompts[at], completions[at], at, fix) from error
    except Exception as error:  # the user's own program may raise anything
        at, tried = _guilty(model, prompts, completions, columns, timeout)
        what = f"failed: {type(error).__name__}: {error}"
        if at is None:
            where = f"a batch of {len(prompts)} rows, the first {tried} of which do not fail alone"
            raise UserError(
                f"The reward '{name}' {what}.", where=where, fix="smaller batches, or mend the reward"
            ) from error
        raise _row_error(name, what, prompts[at], completions[at], at) from error
    if not isinstance(found, Sequence) and not hasattr(found, "tolist"):
        raise _row_error(name, f"gave {type(found).__name__}, not a list", prompts[0], completions[0], 0)
    values = found.tolist() if hasattr(found, "tolist") else list(found)
    if not isinstance(values, list):
        raise _row_error(name, "gave one number, not a list", prompts[0], completions[0], 0)
    if len(values) != len(prompts):
        at = min(len(values), len(prompts) - 1)
        what = f"gave {len(values)} scores for {len(prompts)} rows"
        raise _row_error(name, what, prompts[at], completions[at], at)
    numbers = [_number(name, value, prompts[at], completions[at], at) for at, value in enumerate(values)]
    return [None if number is None else spec.sign * number for number in numbers]


def _number(name: str, value: Any, prompt: Messages, completion: str, at: int) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise _row_error(name, f"gave {value!r:.40}, not a number", prompt, completion, at) from None
    if not abs(number) < LARGEST:
        raise _row_error(name, f"gave {number}", prompt, completion, at)
    return number


def _guilty(
    model: RewardModel,
    prompts: list[Messages],
    completions: list[str],
    columns: dict[str, list[Any]],
    timeout: float | None,
) -> tuple[int | None, int]:
    """The first row that fails alone, or hangs (none where none does), and how many rows were tried before.

    Trying ends when as long has passed again as the batch may take.
    """
    began = time.monotonic()
    for at in range(len(prompts)):
        if timeout is not None and time.monotonic() - began > timeout:
            return None, at
        own = {name: values[at : at + 1] for name, values in columns.items()}
        try:
            within(timeout, partial(model.score, prompts[at : at + 1], completions[at : at + 1], **own))
        except Exception:
            return at, at
    return None, len(prompts)


def _poison(
    model: RewardModel,
    prompts: list[Messages],
    completions: list[str],
    columns: dict[str, list[Any]],
    timeout: float | None,
) -> int | None:
    """The row that fails alone where its neighbour does not; none where all fail (a service that is down)."""
    if len(prompts) == 1:
        return 0
    at, _ = _guilty(model, prompts, completions, columns, timeout)
    if at != 0:
        return at
    others = {name: values[1:2] for name, values in columns.items()}
    return 0 if _guilty(model, prompts[1:2], completions[1:2], others, timeout) == (None, 1) else None


def _row_error(name: str, what: str, prompt: Messages, completion: str, at: int, fix: str | None = None) -> UserError:
    return UserError(
        f"The reward '{name}' {what}.",
        where=_shown_row(prompt, completion, at),
        fix=fix or "align-unlearn reward check tries a reward before a run",
    )


def _shown_row(prompt: Messages, completion: str, at: int) -> str:
    asked = " ".join(plain_prompt(prompt[-1:]).split())[:SHOWN]
    said = " ".join(completion.split())[:SHOWN]
    return f"row {at} of the batch: prompt {asked!r}, completion {said!r}"
