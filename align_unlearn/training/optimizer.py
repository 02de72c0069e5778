"""A learning rate of their own for some of an optimiser's parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def give_own_rate(optimizer: Any, parameters: Iterable[Tensor], learning_rate: float) -> Any:
    """Moves `parameters` to a group of `optimizer` with this rate; the schedule then scales it like the others.

    Call it once, before the schedule is made. Returns the optimiser.
    """
    own = {id(parameter): parameter for parameter in parameters}
    settings = {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
    group = {**settings, "params": list(own.values()), "lr": learning_rate, "weight_decay": 0.0}
    optimizer.add_param_group(group)
    return optimizer
