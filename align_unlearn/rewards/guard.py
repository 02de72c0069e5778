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
PROBED = 30.0
"""Seconds that rows are asked alone for, to find the one that fails, where a batch may take any time."""
DOWN = 3
"""Rows that fail alone, one after the other, before it is the reward that is at fault and not a row."""
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
        where = _failing(model, prompts, completions, columns, timeout)
        where = ", ".join(filter(None, (f"reward {name}", where, error.where)))
        raise UserError(error.problem, where=where, fix=error.fix) from error
    except TimeoutError as error:
        raise UserError(
            f"The reward '{name}' gave no answer in {timeout} s.",
            where=_failing(model, prompts, completions, columns, timeout),
            fix=f"a longer timeout, or a faster reward; the batch had {len(prompts)} rows",
        ) from error
    except Exception as error:  # the user's own program may raise anything
        raise UserError(
            f"The reward '{name}' failed: {type(error).__name__}: {error}.",
            where=_failing(model, prompts, completions, columns, timeout),
            fix="smaller batches, or mend the reward; align-unlearn reward check tries it before a run",
        ) from error
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


def _failing(
    model: RewardModel,
    prompts: list[Messages],
    completions: list[str],
    columns: dict[str, list[Any]],
    timeout: float | None,
) -> str:
    """The row that fails alone where another does not; else what asking rows alone showed.

    Asking ends when as long has passed as the batch may take (`PROBED` where that is any time). A row is asked again
    before it is named: a service that comes and goes fails at any.
    """
    count, began = len(prompts), time.monotonic()

    def late() -> bool:
        return time.monotonic() - began > (timeout or PROBED)

    def fails(at: int) -> bool:
        own = {name: values[at : at + 1] for name, values in columns.items()}
        try:
            within(timeout, partial(model.score, prompts[at : at + 1], completions[at : at + 1], **own))
        except Exception:
            return True
        return False

    if count == 1:
        return f"a batch of one, {_shown_row(prompts[0], completions[0], 0)}"
    first, failed, tried = 0, 0, 0
    while tried < count and failed < DOWN and not late():
        tried += 1
        if fails(tried - 1):
            first, failed = first if failed else tried - 1, failed + 1
        if 0 < failed < tried:
            if late() or fails(first):
                return _shown_row(prompts[first], completions[first], first)
            return f"a batch of {count} rows, one of which failed alone, and then did not"
    return f"a batch of {count} rows, the first {tried} of which {'' if failed else 'do not '}fail alone"


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
