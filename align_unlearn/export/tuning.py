"""The scales of a rounded model trained, end to end, to say what the adapter model says.

Codes change by whole steps; the scale of each block is a number that can be set finely, and is stored anyway. Trained
on the exact KL(adapter model ‖ rounded model) over calibration texts, the scales take up what the codes could not say,
and last of all that what was forgotten is no likelier than it is to the adapter model. The codes stay as they are (the
second phase of EfficientQAT, arXiv:2407.11062, with the divergence in place of the loss).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from align_unlearn.export.answer_states import answer_states, answer_states_with_gradient
from align_unlearn.export.calibration import Text
from align_unlearn.modeling.forward import frozen
from align_unlearn.modeling.generate import progress_bar
from align_unlearn.modeling.grid import Grid
from align_unlearn.modeling.lm_head import LMHead, kl_divergence, token_logps
from align_unlearn.modeling.round_trip import linear_layers

STEPS, RATE, BATCH = 90, 4e-4, 8
CORRECTIONS = 3


class RoundedLinear(nn.Module):
    """A linear layer with fixed codes and a factor for the scale of each block."""

    level: Tensor
    scale: Tensor
    offset: Tensor | None

    def __init__(self, layer: nn.Linear, grid: Grid, codes: Tensor) -> None:
        super().__init__()
        shape = (codes.shape[0], -1, grid.block)
        self.register_buffer("level", grid.levels[codes.long()].reshape(shape), persistent=False)
        self.register_buffer("scale", grid.scale, persistent=False)
        self.register_buffer("offset", grid.offset, persistent=False)
        self.factor = nn.Parameter(torch.zeros_like(grid.scale))
        self.bias = layer.bias

    def forward(self, states: Tensor) -> Tensor:
        """The layer's output."""
        weight = self.level * (self.scale * (1 + self.factor))[..., None]
        if self.offset is not None:
            weight = weight + self.offset[..., None]
        return nn.functional.linear(states, weight.reshape(weight.shape[0], -1).to(states.dtype), self.bias)


def tuned_scales(
    target: Any,
    wanted: Sequence[Tensor],
    codes: Mapping[str, tuple[Grid, Tensor]],
    texts: Sequence[Text],
    *,
    steps: int = STEPS,
    learning_rate: float = RATE,
    seed: int = 0,
) -> dict[str, tuple[Grid, Tensor]]:
    """The codes with new scales on their grids; embeddings that have codes are read from them, and stay.

    Args:
        target: a plain model; left as it was.
        wanted: of each text, `wanted_states` of the model whose answers are wanted.
        codes: by layer, and by embedding.
        texts: to train on; those forgotten are in the end no likelier, in the mean, than to the adapter model.
        steps: of training.
        learning_rate: at its beginning.
        seed: of the order of the texts.
    """
    layers, asked = linear_layers(target), LMHead.of(target)
    found = {name: RoundedLinear(layers[name], grid, own) for name, (grid, own) in codes.items() if name in layers}
    tables = {name: grid.read(own) for name, (grid, own) in codes.items() if name not in layers}
    factors = [each.factor for each in found.values()]
    with frozen(target), _swapped(target, found), _read_from(target, tables):
        spread = _train(target, wanted, asked, factors, texts, steps, learning_rate, seed)
        forgotten = [at for at, text in enumerate(texts) if text.forgotten]
        for _ in range(CORRECTIONS if forgotten else 0):
            _correct(target, [wanted[at] for at in forgotten], asked, factors, [texts[at] for at in forgotten], spread)
    tuned = {name: codes[name][0].rescaled(1 + each.factor.detach()) for name, each in found.items()}
    return {name: (tuned.get(name, grid), own) for name, (grid, own) in codes.items()}


@contextmanager
def _swapped(model: Any, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within the block, the model has these layers in place of its own."""
    before = {name: model.get_submodule(name) for name in layers}
    try:
        _swap(model, layers)
        yield
    finally:
        _swap(model, before)


def _swap(model: Any, layers: Mapping[str, nn.Module]) -> None:
    for name, layer in layers.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer)


@contextmanager
def _read_from(model: Any, tables: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the block, embeddings (and a head that is one of them) have these weights."""
    weights = {name: model.get_submodule(name).weight for name in tables}
    before = {name: weight.data for name, weight in weights.items()}  # not copied: a head of before still reads it
    try:
        for name, weight in weights.items():
            weight.data = tables[name].to(weight)
        yield
    finally:
        for name, weight in weights.items():
            weight.data = before[name]


def _train(
    model: Any,
    wanted: Sequence[Tensor],
    asked: LMHead,
    factors: list[nn.Parameter],
    texts: Sequence[Text],
    steps: int,
    learning_rate: float,
    seed: int,
) -> list[Tensor]:
    """Trains the factors on the divergence; returns the mean squares of their gradients, of late."""
    optimizer = torch.optim.Adam(factors, lr=learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    draw, order, head = random.Random(seed), list[int](), LMHead.of(model)
    with progress_bar() as progress:
        bar = progress.add_task("tuning scales", total=steps)
        for _ in range(steps):
            while len(order) < BATCH:
                order += draw.sample(range(len(texts)), len(texts))
            batch, order = order[:BATCH], order[BATCH:]
            own, said = [wanted[at] for at in batch], answer_states_with_gradient(model, [texts[at] for at in batch])
            loss = kl_divergence(torch.cat(own), torch.cat(said), head, ref_head=asked).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            progress.update(bar, advance=1, description=f"tuning scales, KL {float(loss.detach()):.3f}")
    return [optimizer.state[factor]["exp_avg_sq"] for factor in factors]


def _correct(
    model: Any,
    wanted: Sequence[Tensor],
    asked: LMHead,
    factors: list[nn.Parameter],
    texts: Sequence[Text],
    spread: Sequence[Tensor],
) -> None:
    """One step to where the forgotten texts are, in the mean, no likelier than the adapter model says.

    A divergence of a hundredth of a nat leaves room for texts that are all a little likelier again. Of all steps that
    close this gap, to first order, it is the one that costs least divergence, whose curvature is about the mean square
    of its gradient: along g / (v + mean v), g the gap's own gradient.
    """
    for factor in factors:
        factor.grad = None
    gap = 0.0
    for start in range(0, len(texts), BATCH):
        piece = slice(start, start + BATCH)
        likelier = _likelier(model, texts[piece], wanted[piece], asked).sum() / len(texts)
        likelier.backward()  # type: ignore[no-untyped-call]
        gap += float(likelier.detach())
    if gap <= 0:  # less likely than asked is forgotten too
        return
    with torch.no_grad():
        damping = sum(float(each.sum()) for each in spread) / sum(each.numel() for each in spread)
        slopes = [torch.zeros_like(factor) if factor.grad is None else factor.grad for factor in factors]
        steps = [slope / (own + damping) for slope, own in zip(slopes, spread, strict=True)]
        moved = sum(float((slope * step).sum()) for slope, step in zip(slopes, steps, strict=True))
        for factor, step in zip(factors, steps, strict=True):
            factor.sub_(step, alpha=gap / moved)


def _likelier(model: Any, texts: Sequence[Text], wanted: Sequence[Tensor], asked: LMHead) -> Tensor:
    """(texts,) by how much the model says each completion is likelier than the adapter model does, nats a token."""
    head = LMHead.of(model)
    found = []
    for own, before, text in zip(answer_states_with_gradient(model, texts), wanted, texts, strict=True):
        labels = torch.tensor(text.tokens.completion_ids, device=own.device)
        logps = [token_logps(each[:-1], labels, by) for each, by in ((own, head), (before, asked))]
        found.append(logps[0].mean() - logps[1].detach().mean())
    return torch.stack(found)


@torch.no_grad()
def wanted_states(model: Any, texts: Sequence[Text]) -> list[Tensor]:
    """`answer_states` of all texts, which what is tuned is to have."""
    found: list[Tensor] = []
    for start in range(0, len(texts), BATCH):
        found += answer_states(model, texts[start : start + BATCH])
    return found
