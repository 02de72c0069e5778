"""The grids that quantisers round to: for every block of a weight, which values there are.

A grid is made from one weight and may then round another: a weight that has moved a little keeps the scales of the one
that it was trained on, so that what has not moved keeps its code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from align_unlearn.errors import unknown_name


@dataclass(frozen=True)
class Grid:
    """Values `scale · level + offset` for each block of a row.

    Attributes:
        kind: of `GRIDS`: the format that such codes are written in.
        levels: (L,) in rising order.
        scale: (rows, blocks), fp32.
        offset: (rows, blocks), fp32, or none.
        block: columns of a block.
        stored: the dtype that the format keeps scales and offsets in.
    """

    kind: str
    levels: Tensor
    scale: Tensor
    offset: Tensor | None
    block: int
    stored: torch.dtype = torch.float32

    def codes(self, values: Tensor, column: int) -> Tensor:
        """(rows,) the nearest level's number for the values of one column."""
        at = column // self.block
        moved = values if self.offset is None else values - self.offset[:, at]
        scale = self.scale[:, at]
        relative = moved / torch.where(scale == 0, torch.ones_like(scale), scale)
        middles = (self.levels[1:] + self.levels[:-1]) / 2
        return torch.bucketize(relative.contiguous(), middles, out_int32=True)

    def values(self, codes: Tensor, column: int) -> Tensor:
        """(rows,) what the codes of one column stand for."""
        at = column // self.block
        found = self.levels[codes.long()] * self.scale[:, at]
        return found if self.offset is None else found + self.offset[:, at]

    def nearest(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(rows, columns) codes of a whole weight, each value rounded by itself, and what they stand for."""
        blocks = _blocks(weight, self.block)
        moved = blocks if self.offset is None else blocks - self.offset[..., None]
        scale = torch.where(self.scale == 0, torch.ones_like(self.scale), self.scale)
        middles = (self.levels[1:] + self.levels[:-1]) / 2
        codes = torch.bucketize(moved / scale[..., None], middles, out_int32=True)
        codes = codes.to(torch.uint8).reshape(weight.shape)
        return codes, self.read(codes)

    def read(self, codes: Tensor) -> Tensor:
        """(rows, columns) what the codes of a whole weight stand for."""
        levels = self.levels.index_select(0, codes.flatten().int())
        found = _blocks(levels.reshape(codes.shape), self.block) * self.scale[..., None]
        return (found if self.offset is None else found + self.offset[..., None]).reshape(codes.shape)

    def rescaled(self, factor: Tensor) -> Grid:
        """The grid with each block's scale times its (rows, blocks) factor, as the format stores it."""
        return self.with_scales(self.scale * factor)

    def with_scales(self, scale: Tensor) -> Grid:
        """The grid with other (rows, blocks) scales, as the format stores them."""
        return replace(self, scale=self._kept(scale))

    def narrowed(self, factor: float) -> Grid:
        """The grid with every block's range times a factor, about its middle or, without an offset, about zero."""
        narrow = self.rescaled(torch.full_like(self.scale, factor))
        if self.offset is None:
            return narrow
        middle = (self.levels[0] + self.levels[-1]) / 2
        return replace(narrow, offset=self._kept(self.offset + (self.scale - narrow.scale) * middle))

    def _kept(self, values: Tensor) -> Tensor:
        return values.to(self.stored).float()


def four_bit_grid(weight: Tensor, quant_type: str, block: int = 64) -> Grid | None:
    """bitsandbytes' 4-bit grid: each block's largest magnitude times a fixed table. None where blocks cross rows."""
    from bitsandbytes import functional

    if weight.shape[1] % block:
        return None
    table = functional.get_4bit_type(quant_type, device="cpu")
    levels = table.to(weight.device).float().unique()
    return Grid(quant_type, levels, _blocks(weight, block).abs().amax(-1), None, block)


def int8_grid(weight: Tensor) -> Grid:
    """LLM.int8's: a row's largest magnitude in 127 steps to either side."""
    scale = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    return Grid("int8", torch.arange(-127.0, 128.0, device=weight.device), scale, None, weight.shape[1])


def q8_0_grid(weight: Tensor) -> Grid | None:
    """llama.cpp's Q8_0: blocks of 32, the largest magnitude in 127 steps to either side, the step in fp16."""
    if weight.shape[1] % 32:
        return None
    scale = (_blocks(weight, 32).abs().amax(-1) / 127).half().float()
    return Grid("q8_0", torch.arange(-127.0, 128.0, device=weight.device), scale, None, 32, torch.float16)


def q4_0_grid(weight: Tensor) -> Grid | None:
    """llama.cpp's Q4_0: blocks of 32, sixteen steps of which the eighth from the end is zero, the step in fp16."""
    if weight.shape[1] % 32:
        return None
    blocks = _blocks(weight, 32)
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))[..., 0]
    scale = (largest / -8).half().float()
    return Grid("q4_0", torch.arange(-8.0, 8.0, device=weight.device), scale, None, 32, torch.float16)


def q5_1_grid(weight: Tensor) -> Grid | None:
    """llama.cpp's Q5_1: blocks of 32, 32 steps from the smallest value to the largest, both ends in fp16."""
    if weight.shape[1] % 32:
        return None
    blocks = _blocks(weight, 32)
    low, high = blocks.amin(-1), blocks.amax(-1)
    scale = ((high - low) / 31).half().float()
    return Grid("q5_1", torch.arange(0.0, 32.0, device=weight.device), scale, low.half().float(), 32, torch.float16)


GRIDS: dict[str, Callable[[Tensor], Grid | None]] = {
    "nf4": lambda weight: four_bit_grid(weight, "nf4"),
    "fp4": lambda weight: four_bit_grid(weight, "fp4"),
    "int8": int8_grid,
    "q8_0": q8_0_grid,
    "q5_1": q5_1_grid,
    "q4_0": q4_0_grid,
}


def grid_of(weight: Tensor, precision: str) -> Grid | None:
    """The grid of a (rows, columns) weight; none where the format leaves a weight of this width as it is.

    Raises:
        UserError: there is no such precision.
    """
    if precision not in GRIDS:
        raise unknown_name("precision", precision, GRIDS)
    return GRIDS[precision](weight.float())


def _blocks(weight: Tensor, block: int) -> Tensor:
    return weight.float().reshape(weight.shape[0], -1, block)
