"""The bytes of a GGUF file spent where they count: what embeddings give up goes to the layers that lose most.

Beside rounded layers a file holds its embeddings in eight bits (`gguf_file.EMBEDDINGS`), of which they lose next to
nothing; of a small model they are a third of the file. Rounded to a precision between, with the answers in mind as the
layers are, they lose little more, and the bytes let those layers be finer that lose most a weight. llama.cpp's own
files mix their tensors so, by name; here what each loses is known. The file is no larger than before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from align_unlearn.export.gguf_file import EMBEDDINGS
from align_unlearn.export.packed import file_bytes
from align_unlearn.modeling.generate import progress_bar
from align_unlearn.modeling.grid import Grid, grid_of
from align_unlearn.modeling.plain import held_weight
from align_unlearn.modeling.round_trip import linear_layers, vocabulary_tables
from align_unlearn.modeling.rounding import alternated, closest, feedback

FINER = {"q4_0": "q5_1"}
"""By a precision that can be mixed, what embeddings and the layers that lose most are held in."""
ROWS = 8192
"""Of an embedding, rounded at once."""


def mixed_codes(
    target: Any, base: Any, precision: str, inputs: Mapping[str, Tensor], codes: Mapping[str, tuple[Grid, Tensor]]
) -> dict[str, tuple[Grid, Tensor]]:
    """The codes with those of some layers made finer, and with the embeddings', in no more bytes; as they were where
    the answers would lose more by it.

    Args:
        target: a plain model.
        base: the original, with adapters or without.
        precision: of `FINER`.
        inputs: by layer and embedding, `moments` of the target.
        codes: of its layers, in that precision.
    """
    finer, layers = FINER[precision], linear_layers(target)
    tables = {name: own.weight.detach().float() for name, own in vocabulary_tables(target).items()}
    if any(grid_of(weight, finer) is None for weight in tables.values()):
        return dict(codes)  # the file holds them in 16 bits
    weights = {name: layers[name].weight.detach().float() for name in codes}
    room = sum(file_bytes(EMBEDDINGS, own.numel()) - file_bytes(finer, own.numel()) for own in tables.values())
    lost = {name: lost_by(weights[name], *own, inputs[name]) for name, own in codes.items()}
    chosen = []
    for name in sorted(lost, key=lambda name: -lost[name] / weights[name].numel()):
        needed = file_bytes(finer, weights[name].numel()) - file_bytes(precision, weights[name].numel())
        if needed <= room:
            room -= needed
            chosen.append(name)
    found: dict[str, tuple[Grid, Tensor]] = {}
    with progress_bar() as progress:
        bar = progress.add_task(f"{finer} where most is lost", total=len(chosen) + len(tables))
        for name in chosen:
            before = held_weight(base, name)
            found[name] = closest(weights[name], before, _grid(before, finer), inputs[name])
            progress.advance(bar)
        for name, weight in tables.items():
            found[name] = _table(weight, finer, inputs[name])
            progress.advance(bar)
    every = weights | tables
    after = sum(lost_by(every[name], *own, inputs[name]) for name, own in found.items())
    return {**codes, **(found if after < sum(lost[name] for name in chosen) else {})}


def lost_by(weight: Tensor, grid: Grid, codes: Tensor, moments: Tensor) -> float:
    """½ Σ e M eᵀ over the rows' errors e, over the rows: what the answers lose, nats over all texts.

    The moments are sums over all rows, so that each counts as their mean: an estimate to second order, of which codes
    on SmolLM2-135M lost 1.1 times as much on the texts themselves.

    Args:
        weight: (rows, columns).
        grid: of the codes.
        codes: (rows, columns).
        moments: (columns, columns) of `moments`.
    """
    error = grid.read(codes) - weight
    return float(((error @ moments) * error).sum()) / 2 / len(weight)


def _grid(weight: Tensor, precision: str) -> Grid:
    grid = grid_of(weight, precision)
    assert grid is not None  # both have blocks of 32
    return grid


def _table(weight: Tensor, precision: str, moments: Tensor) -> tuple[Grid, Tensor]:
    """Grid and codes of an embedding, a piece of its many rows at a time."""
    order = feedback(moments)
    pieces = [alternated(rows, _grid(rows, precision), order, moments) for rows in torch.split(weight, ROWS)]
    grids, codes = zip(*pieces, strict=True)
    offsets = [grid.offset for grid in grids if grid.offset is not None]
    whole = replace(grids[0], scale=torch.cat([grid.scale for grid in grids]),
                    offset=torch.cat(offsets) if offsets else None)  # fmt: skip
    return whole, torch.cat(codes)
