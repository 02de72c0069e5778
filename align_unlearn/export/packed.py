"""Codes of a weight as the bytes that a format stores, block by block."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from align_unlearn.modeling.grid import Grid

Bytes = NDArray[Any]
"""Of uint8."""


def four_bit_bytes(codes: Tensor, grid: Grid, table: Tensor) -> Bytes:
    """bitsandbytes' packing: two values a byte, the first in the upper half, as places in its own table.

    Args:
        codes: (rows, columns) places in the grid's levels, which rise.
        grid: theirs.
        table: (16,) the format's levels in the order in which it numbers them.
    """
    # FP4 has zero twice, and a level of the grid is any of those that are equal to it
    named = (grid.levels.cpu()[:, None] == table.float().cpu()).int().argmax(1)
    numbers = named[codes.cpu().long()].numpy().astype(np.uint8).reshape(-1)
    return (numbers[::2] << 4) | numbers[1::2]


def q8_0_bytes(codes: Tensor, grid: Grid) -> Bytes:
    """(rows, bytes): a step in fp16 and 32 signed bytes a block."""
    levels = (_numbers(codes, grid).astype(np.int16) - 127).astype(np.int8)
    return _rows(codes, [_half(grid.scale), levels.view(np.uint8)])


def q4_0_bytes(codes: Tensor, grid: Grid) -> Bytes:
    """(rows, bytes): a step in fp16 and 16 bytes a block, its first half in the lower halves of the bytes."""
    numbers = _numbers(codes, grid)
    return _rows(codes, [_half(grid.scale), numbers[:, :16] | (numbers[:, 16:] << 4)])


def q5_1_bytes(codes: Tensor, grid: Grid) -> Bytes:
    """(rows, bytes): step and smallest value in fp16, the fifth bits, then 16 bytes as in Q4_0."""
    numbers = _numbers(codes, grid)
    fifth = np.packbits(numbers >> 4, axis=1, bitorder="little")
    low = numbers & 15
    assert grid.offset is not None
    return _rows(codes, [_half(grid.scale), _half(grid.offset), fifth, low[:, :16] | (low[:, 16:] << 4)])


def file_bytes(kind: str, values: int) -> int:
    """What so many values take in a GGUF file."""
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[getattr(gguf.GGMLQuantizationType, kind.upper())]
    return values // int(block) * int(size)


def _numbers(codes: Tensor, grid: Grid) -> Bytes:
    return codes.reshape(-1, grid.block).to("cpu").numpy().astype(np.uint8)


def _half(values: Tensor) -> Bytes:
    return values.reshape(-1, 1).half().to("cpu").numpy().view(np.uint8)


def _rows(codes: Tensor, parts: list[Bytes]) -> Bytes:
    return np.concatenate(parts, axis=1).reshape(codes.shape[0], -1)


GGUF_BYTES = {"q8_0": q8_0_bytes, "q5_1": q5_1_bytes, "q4_0": q4_0_bytes}
GGUF = ("f16", *GGUF_BYTES)
"""Every precision that is written as a GGUF file."""
