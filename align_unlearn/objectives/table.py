"""The names of the objectives, and how a name, `module:function` or `file.py:function` becomes one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from align_unlearn.errors import UserError, unknown_name
from align_unlearn.imports import import_by_name
from align_unlearn.objectives import forget, retain
from align_unlearn.objectives.view import CompletionView

Loss = Callable[[CompletionView], Tensor]


@dataclass(frozen=True)
class ForgetObjective:
    """A forget objective and what it goes with.

    Attributes:
        loss: the function, (B,) from a view.
        retain: the retain regulariser that its paper uses; a recipe's `retain` overrides it.
        reference: whether it looks at `ref_logps`, so that they are worth computing once before training.
    """

    loss: Callable[..., Tensor]
    retain: str
    reference: bool


FORGET: dict[str, ForgetObjective] = {
    "ga": ForgetObjective(forget.ga, retain="none", reference=False),
    "graddiff": ForgetObjective(forget.ga, retain="nll", reference=False),
    "npo": ForgetObjective(forget.npo, retain="kl", reference=True),
    "simnpo": ForgetObjective(forget.simnpo, retain="nll", reference=False),
}

RETAIN: dict[str, Callable[[CompletionView], Tensor] | None] = {"kl": retain.kl, "nll": retain.nll, "none": None}

PREFERENCE = ("dpo",)
"""Objectives on preference rows; they are TRL's own and need a chosen answer beside the rejected one."""


def forget_objective(name: str) -> ForgetObjective:
    """The objective that `name` stands for.

    Raises:
        UserError: no objective of that name; the nearest ones are named.
    """
    if name in FORGET:
        return FORGET[name]
    if ":" in name:
        return ForgetObjective(import_by_name(name, kind="objective"), retain="kl", reference=True)
    raise unknown_name("objective", name, [*FORGET, *PREFERENCE], where="objective")


def bind(objective: ForgetObjective, name: str, settings: Mapping[str, Any]) -> Loss:
    """The objective with its hyper-parameters set.

    Raises:
        UserError: a hyper-parameter that this objective does not have; the nearest one is named.
    """
    valid = list(inspect.signature(objective.loss).parameters)[1:]
    for key in settings:
        if key not in valid:
            if not valid:
                raise UserError(f"The objective '{name}' has no hyper-parameters.", where=f"objective_kwargs: {key}")
            raise unknown_name(f"hyper-parameter of {name}", key, valid, where="objective_kwargs")
    return partial(objective.loss, **settings)
