"""How much of a text a model has by heart, from one reading of it: published definitions, one function each.

All are functions of a `Reading`, a completion of n tokens read once.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from align_unlearn.audit.reading import Reading


def probability(reading: Reading) -> float:
    """exp of the mean log-probability a token (arXiv:2401.06121)."""
    return float(reading.logps.mean().exp())


def extraction_strength(reading: Reading) -> float:
    """1 − k/n, k the shortest prefix after which greedy decoding gives all of the rest; 0 where it gives none."""
    missed = torch.nonzero(~reading.hits)
    prefix = int(missed[-1]) + 1 if len(missed) else 0
    return 1 - prefix / len(reading.hits)


def exact_memorisation(reading: Reading) -> float:
    """Share of tokens that are the likeliest one, given all before them."""
    return float(reading.hits.float().mean())


def min_k(reading: Reading, share: float = 0.2) -> float:
    """Min-K% (arXiv:2310.16789): mean of the lowest `share` of the tokens' log-probabilities."""
    return _lowest(reading.logps, share)


def min_k_plus(reading: Reading, share: float = 0.2) -> float:
    """Min-K%++ (arXiv:2404.02936): the same of (log p − μ)/σ, μ and σ over the vocabulary.

    Where the model is certain (σ near 0) a token that it expects scores 0.
    """
    return _lowest((reading.logps - reading.mean) / reading.std.clamp(min=1e-4), share)


def zlib_score(reading: Reading, text: str) -> float:
    """Mean log-probability a token over the bytes that zlib packs the text into (arXiv:2012.07805)."""
    return float(reading.logps.mean()) / len(zlib.compress(text.encode("utf-8")))


def _lowest(values: Tensor, share: float) -> float:
    count = max(1, int(len(values) * share))
    return float(values.sort().values[:count].mean())
