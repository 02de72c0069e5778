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
        distils: whether it looks at the original's whole distribution on forget rows.
        chosen: whether each forget row needs a chosen answer beside it.
        forget_coef: weight that its paper gives it; a recipe's `forget_coef` overrides it.
        needs: keys that a recipe must set, because there is no value that fits all.
        sign: what the adapter is multiplied by when it is saved.
    """

    loss: Callable[..., Tensor]
    retain: str
    reference: bool = False
    distils: bool = False
    chosen: bool = False
    forget_coef: float = 1.0
    needs: tuple[str, ...] = ()
    sign: float = 1.0


FORGET: dict[str, ForgetObjective] = {
    "ga": ForgetObjective(forget.ga, retain="none"),
    "graddiff": ForgetObjective(forget.ga, retain="nll"),
    "kl_min": ForgetObjective(forget.ga, retain="kl"),
    "npo": ForgetObjective(forget.npo, retain="kl", reference=True),
    "simnpo": ForgetObjective(forget.simnpo, retain="nll", forget_coef=0.125),
    "undial": ForgetObjective(forget.undial, retain="none", distils=True),
    "wga": ForgetObjective(forget.wga, retain="nll"),
    "satimp": ForgetObjective(forget.satimp, retain="nll", forget_coef=0.1),
    "ceu": ForgetObjective(forget.ceu, retain="none"),
    "pdu": ForgetObjective(forget.pdu, retain="nll", needs=("retain_epsilon",)),
    "rmu": ForgetObjective(forget.rmu, retain="hidden"),
    "ihl": ForgetObjective(forget.ihl, retain="nll"),
    "flat": ForgetObjective(forget.flat, retain="none", chosen=True),
    "jensun": ForgetObjective(forget.jensun, retain="js", chosen=True),
    "idk": ForgetObjective(forget.idk, retain="nll", reference=True, chosen=True),
    "altpo": ForgetObjective(forget.idk, retain="nll", reference=True, chosen=True),
    "negate": ForgetObjective(forget.negate, retain="none", sign=-1.0),
}

RETAIN: dict[str, Callable[..., Tensor] | None] = {
    "kl": retain.kl,
    "nll": retain.nll,
    "kl+nll": retain.kl_nll,
    "js": retain.js,
    "hidden": retain.hidden,
    "none": None,
}

PREFERENCE = ("dpo", "kto")
"""Objectives on preference rows that are TRL's own trainers."""

ONLINE = ("ppo", "rloo", "grpo")
"""Objectives that learn from rewards of what the policy itself says."""

TRAINERS = (*PREFERENCE, *ONLINE)
"""Objectives that are trainers of their own and not a loss."""


def forget_objective(name: str) -> ForgetObjective:
    """The objective that `name` stands for.

    Raises:
        UserError: no objective of that name; the nearest ones are named.
    """
    if name in FORGET:
        return FORGET[name]
    if ":" in name:
        return ForgetObjective(import_by_name(name, kind="objective"), retain="kl", reference=True)
    raise unknown_name("objective", name, [*FORGET, *TRAINERS], where="objective")


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


def check_needs(objective: ForgetObjective, name: str, settings: Any) -> None:
    """Refuses a recipe that leaves open what the objective needs.

    Args:
        settings: the trainer's configuration.

    Raises:
        UserError: a key is not set.
    """
    for key in objective.needs:
        if getattr(settings, key) is None:
            raise UserError(f"The objective '{name}' needs {key}.", where=key, fix=f"--{key} VALUE")


def bind_retain(name: str, settings: Mapping[str, Any]) -> Loss:
    """The retain regulariser with those of the objective's hyper-parameters that it knows too (a layer, say)."""
    function = RETAIN[name]
    assert function is not None
    known = inspect.signature(function).parameters
    return partial(function, **{key: value for key, value in settings.items() if key in known})
