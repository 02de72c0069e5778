"""A whole model rounded to a precision: layer by layer, then its scales tuned to say what the adapter model says.

    nearest      each value to the nearest level of a grid of its own: today's practice
    compensated  codes chosen so that each layer keeps its output (`modeling/rounding.py`), on the grid of a base that
                 lies on one, else with scales that are chosen in turn with them
    tuned        the same codes; the scales of their blocks trained for a few steps on the KL to the adapter model
    mixed        likewise, once some of the bytes of a GGUF file's embeddings went to the layers that lose most

None of them adds a byte to the base's own quantisation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from align_unlearn.errors import UserError, unknown_name
from align_unlearn.export.calibration import Text
from align_unlearn.export.mixed import FINER, mixed_codes
from align_unlearn.export.moments import moments
from align_unlearn.export.tuning import tuned_scales, wanted_states
from align_unlearn.modeling.generate import progress_bar
from align_unlearn.modeling.grid import GRIDS, Grid, grid_of
from align_unlearn.modeling.plain import held_weight
from align_unlearn.modeling.round_trip import linear_layers
from align_unlearn.modeling.rounding import closest

ROUNDINGS = ("nearest", "compensated", "tuned", "mixed")
DEFAULT_ROUNDING = {"nf4": "tuned", "fp4": "tuned", "q4_0": "mixed"}
"""Of precisions so coarse that an update does not survive them unaided; others are rounded to the nearest."""
Codes = dict[str, tuple[Grid, Tensor]]
"""By layer (and embedding, where it has any), its grid and its (rows, columns) codes."""


def roundings_of(precision: str) -> tuple[str, ...]:
    """Those of `ROUNDINGS` that a precision knows: where it has no grid nothing is chosen, and LLM.int8's library
    rounds for itself."""
    if precision == "int8" or precision not in GRIDS:
        return ROUNDINGS[:1]
    return ROUNDINGS if precision in FINER else ROUNDINGS[:-1]


def default_rounding(precision: str) -> str:
    """What `merge` does where none is named."""
    return DEFAULT_ROUNDING.get(precision, "nearest")


def check_rounding(precision: str, rounding: str) -> None:
    """Refuses a rounding that is none, or none of the precision's.

    Raises:
        UserError: as said.
    """
    if rounding not in ROUNDINGS:
        raise unknown_name("rounding", rounding, ROUNDINGS, where="--rounding")
    if rounding not in (known := roundings_of(precision)):
        raise UserError(f"Weights in {precision} cannot be rounded so.", where=f"--rounding {rounding}",
                        fix=f"one of: {', '.join(known)}; or another --precision")  # fmt: skip


def rounded_layers(target: Any, base: Any, adapter: Any, precision: str, rounding: str, texts: Sequence[Text]) -> Codes:
    """The codes of every linear layer of `target` that the precision rounds, and of embeddings that are `mixed` in.

    Args:
        target: a plain model whose weights are to be rounded.
        base: the original, with adapters or without; where the weights that it holds lie on a grid, it is kept by
            every rounding but `nearest`.
        adapter: the plain adapter model, whose answers the tuned scales are to give.
        precision: of `GRIDS`.
        rounding: of `roundings_of` the precision.
        texts: to calibrate on; none are needed for `nearest`.

    Raises:
        UserError: there is no such rounding or precision, or no layer that it could round.
    """
    check_rounding(precision, rounding)
    if rounding == "nearest":
        return nearest_codes(target, precision)
    inputs = moments(target, texts)
    codes = compensated_codes(target, base, precision, inputs)
    if rounding == "mixed":
        codes = mixed_codes(target, base, precision, inputs, codes)
    del inputs
    return codes if rounding == "compensated" else tuned_scales(target, wanted_states(adapter, texts), codes, texts)


def nearest_codes(target: Any, precision: str) -> Codes:
    """Each value of a plain model's linear layers to the nearest level of a grid of its own.

    Raises:
        UserError: there is no such precision, or no layer that it could round.
    """

    def rounded(name: str, weight: Tensor) -> tuple[Grid, Tensor] | None:
        grid = grid_of(weight, precision)
        return None if grid is None else (grid, grid.nearest(weight)[0])

    return _codes(target, precision, rounded)


def compensated_codes(target: Any, base: Any, precision: str, inputs: Mapping[str, Tensor]) -> Codes:
    """Codes with which each layer keeps its output, on the grids of a base that lies on them.

    Args:
        target: a plain model.
        base: the original, with adapters or without.
        precision: of `GRIDS`.
        inputs: by layer, `moments` of the target.

    Raises:
        UserError: there is no such precision, or no layer that it could round.
    """

    def rounded(name: str, weight: Tensor) -> tuple[Grid, Tensor] | None:
        before = held_weight(base, name)
        grid = grid_of(before, precision)
        return None if grid is None else closest(weight, before, grid, inputs[name])

    return _codes(target, precision, rounded)


def _codes(target: Any, precision: str, rounded: Callable[[str, Tensor], tuple[Grid, Tensor] | None]) -> Codes:
    layers = linear_layers(target)
    codes: Codes = {}
    with progress_bar() as progress:
        bar = progress.add_task(f"rounding to {precision}", total=len(layers))
        for name, layer in layers.items():
            if (found := rounded(name, layer.weight.detach().float())) is not None:
                codes[name] = found
            progress.advance(bar)
    if not codes:
        raise UserError(f"No layer's width fits the blocks of {precision}.", where="--precision")
    return codes


@torch.no_grad()
def as_rounded(model: Any, codes: Codes) -> Any:
    """The model with its weights in place as the codes stand for; returns it."""
    for name, (grid, own) in codes.items():
        model.get_submodule(name).weight.copy_(grid.read(own))
    return model
