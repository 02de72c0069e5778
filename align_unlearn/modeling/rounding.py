"""Rounding that keeps what a layer does: the error of each column is made up for by the columns after it.

Rounded value by value, a weight that moved by less than half a step snaps back, and an unlearning update is mostly such
moves. Here the columns are rounded one after the other, and what a column lost is added to those that follow, weighted
by how the layer's inputs go together (GPTQ, arXiv:2210.17323, eq. 2 and 3, on a grid that is given). Small moves add up
along a row until a code changes, so that the layer's output keeps the update.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from align_unlearn.modeling.grid import Grid

DAMPING = 0.01
"""Of the mean of the diagonal, added to it: GPTQ's."""
PIECE = 128
"""Columns between two updates of all that follow."""
RANGES = [1.0, *(at / 40 for at in range(28, 47) if at != 40)]
"""Of what a block's largest value asks for: from 0.7, where a few values are cut, to 1.15, for one shorter side."""


@torch.no_grad()
def compensated(weight: Tensor, grid: Grid, moments: Tensor, damping: float = DAMPING) -> tuple[Tensor, Tensor]:
    """(rows, columns) codes and the values that they stand for, close to `weight` in what they make of the inputs.

    Args:
        weight: (rows, columns) of a linear layer.
        grid: of any weight of that shape.
        moments: (columns, columns) Σ m x xᵀ over inputs x of the layer, each with a weight m or none.
        damping: keeps directions apart in which there was no input.
    """
    left = weight.double().clone()
    spread = moments.double().clone()
    spread.diagonal().add_(damping * spread.diagonal().mean().clamp(min=1e-12))
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(spread)), upper=True)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    rounded = torch.empty_like(left)
    for start in range(0, left.shape[1], PIECE):
        end = min(start + PIECE, left.shape[1])
        errors = torch.empty(left.shape[0], end - start, dtype=left.dtype, device=left.device)
        for at in range(start, end):
            codes[:, at] = grid.codes(left[:, at].float(), at)
            rounded[:, at] = grid.values(codes[:, at], at).double()
            error = (left[:, at] - rounded[:, at]) / inverse[at, at]
            left[:, at:end] -= error[:, None] * inverse[at, at:end]
            errors[:, at - start] = error
        left[:, end:] -= errors @ inverse[start:end, end:]
    return codes, rounded.float()


@torch.no_grad()
def descended(weight: Tensor, grid: Grid, codes: Tensor, moments: Tensor, damping: float = DAMPING) -> Tensor:
    """(rows, columns) codes from which no single step to a neighbouring level brings the layer's output closer.

    Coordinate descent: in every row at once the one step is taken that helps most, until none helps, so that the result
    is never farther from the weight's output than the codes that it starts from.

    Args:
        weight: as for `compensated`.
        grid: likewise.
        codes: (rows, columns) to start from.
        moments: likewise.
        damping: likewise.
    """
    spread = moments.float().clone()
    spread.diagonal().add_(damping * spread.diagonal().mean().clamp(min=1e-12))
    spread /= spread.diagonal().mean()
    codes = codes.long()
    width = grid.scale.repeat_interleave(grid.block, 1)
    weight = weight.float()
    error = grid.read(codes) - weight
    slope = error @ spread
    rows = torch.arange(weight.shape[0], device=weight.device)
    for _ in range(2 * weight.shape[1]):
        best = torch.zeros(weight.shape[0], device=weight.device)
        where = torch.zeros_like(best, dtype=torch.long)
        moved = torch.zeros_like(best)
        ahead = torch.zeros_like(where)
        for direction in (1, -1):
            next_codes = (codes + direction).clamp(0, len(grid.levels) - 1)
            step = (grid.levels[next_codes] - grid.levels[codes]) * width
            gain = -(2 * step * slope + step.square() * spread.diagonal())
            value, at = gain.max(1)
            better = value > best
            best, where = torch.where(better, value, best), torch.where(better, at, where)
            moved = torch.where(better, step[rows, at], moved)
            ahead = torch.where(better, next_codes[rows, at], ahead)
        helps = best > 1e-12
        if not helps.any():
            break
        chosen = rows[helps]
        codes[chosen, where[helps]] = ahead[helps]
        slope[chosen] += moved[helps, None] * spread[where[helps]]
    return codes.to(torch.uint8)


@torch.no_grad()
def fitted(weight: Tensor, grid: Grid, moments: Tensor) -> Grid:
    """The grid with the range of each block chosen for all of its values, not for the largest alone.

    Of `RANGES` the one at which Σ d (w − Q(w))² over the block is least, d the diagonal of the moments.

    Args:
        weight: (rows, columns).
        grid: whose ranges hold every value.
        moments: as for `compensated`.
    """
    best = torch.full_like(grid.scale, torch.inf)
    scale, offset = grid.scale, grid.offset
    for width in RANGES:
        narrow = grid.narrowed(width)
        error = (narrow.nearest(weight)[1] - weight).square_().mul_(moments.diagonal())
        lost = error.reshape(*best.shape, grid.block).sum(-1)
        better = lost < best
        best, scale = torch.where(better, lost, best), torch.where(better, narrow.scale, scale)
        if offset is not None and narrow.offset is not None:
            offset = torch.where(better, narrow.offset, offset)
    return replace(grid, scale=scale, offset=offset)


def closest(weight: Tensor, base: Tensor, grid: Grid, moments: Tensor) -> tuple[Grid, Tensor]:
    """Grid and (rows, columns) codes for a weight that moved a little from `base`, keeping what the layer makes of its
    inputs.

    Where the base lies on its grid, its codes are where the descent begins, and only what must change does; elsewhere
    it begins at `compensated` codes, on a `fitted` grid.

    Args:
        weight: (rows, columns) of a linear layer.
        base: what it was before.
        grid: of the base.
        moments: as for `compensated`.
    """
    codes, values = grid.nearest(base)
    if not torch.allclose(values, base, rtol=1e-2, atol=1e-6):
        grid = fitted(weight, grid, moments)
        codes, _ = compensated(weight, grid, moments)
    return grid, descended(weight, grid, codes, moments)
