"""The scales of a rounded model trained, end to end, to say what the adapter model says.

Codes change by whole steps; the scale of each block is a number that can be set finely, and is stored anyway. Trained
on the exact KL(adapter model ‖ rounded model) over calibration texts, the scales take up what the codes could not say.
The codes stay as they are (the second phase of EfficientQAT, arXiv:2407.11062, with the divergence in place of the
loss).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from align_unlearn.data.batches import pad_texts
from align_unlearn.modeling.forward import hidden_states
from align_unlearn.modeling.generate import progress_bar
from align_unlearn.modeling.grid import Grid
from align_unlearn.modeling.lm_head import LMHead, kl_divergence
from align_unlearn.modeling.round_trip import linear_layers

STEPS, RATE, BATCH = 90, 2e-3, 8
HALVES = ("q8_0", "q5_1", "q4_0")
"""Precisions whose scales are stored in fp16."""


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
    adapter: Any,
    codes: Mapping[str, tuple[Grid, Tensor]],
    rows: Sequence[list[int]],
    precision: str,
    *,
    steps: int = STEPS,
    learning_rate: float = RATE,
    seed: int = 0,
) -> dict[str, tuple[Grid, Tensor]]:
    """The codes with new scales on their grids.

    Args:
        target: a plain model; left as it was.
        adapter: the plain model whose answers are wanted.
        codes: by layer.
        rows: texts.
        precision: in whose format the scales are stored.
    """
    layers = linear_layers(target)
    found = {name: RoundedLinear(layers[name], grid, own) for name, (grid, own) in codes.items()}
    wanted = _states(adapter, rows)  # before the layers are swapped: the adapter model may be the target
    asks = [each.requires_grad for each in target.parameters()]
    target.requires_grad_(False)
    try:
        _swap(target, found)
        _train(target, wanted, [each.factor for each in found.values()], rows, steps, learning_rate, seed)
    finally:
        _swap(target, {name: layers[name] for name in found})
        for parameter, wanted in zip(target.parameters(), asks, strict=True):
            parameter.requires_grad_(wanted)
    return {name: (_scaled(codes[name][0], each, precision), codes[name][1]) for name, each in found.items()}


def _scaled(grid: Grid, layer: RoundedLinear, precision: str) -> Grid:
    scale = (grid.scale * (1 + layer.factor.detach())).float()
    return replace(grid, scale=scale.half().float() if precision in HALVES else scale)


def _swap(model: Any, layers: Mapping[str, nn.Module]) -> None:
    for name, layer in layers.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer)


def _train(
    model: Any,
    wanted: Sequence[Tensor],
    factors: list[nn.Parameter],
    rows: Sequence[list[int]],
    steps: int,
    learning_rate: float,
    seed: int,
) -> None:
    optimizer = torch.optim.Adam(factors, lr=learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    draw, order = random.Random(seed), list[int]()
    with progress_bar() as progress:
        bar = progress.add_task("tuning scales", total=steps)
        for _ in range(steps):
            while len(order) < BATCH:
                order += draw.sample(range(len(rows)), len(rows))
            batch, order = order[:BATCH], order[BATCH:]
            loss = _divergence(model, [rows[at] for at in batch], [wanted[at] for at in batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            progress.update(bar, advance=1, description=f"tuning scales, KL {float(loss.detach()):.3f}")


@torch.no_grad()
def _states(model: Any, rows: Sequence[list[int]]) -> list[Tensor]:
    """Of each row, (tokens, H) final hidden states."""
    found: list[Tensor] = []
    for start in range(0, len(rows), BATCH):
        batch = pad_texts(rows[start : start + BATCH], model.device)
        states = hidden_states(model, batch["input_ids"], batch["attention_mask"])
        found += [own[mask.bool()] for own, mask in zip(states, batch["attention_mask"], strict=True)]
    return found


def _divergence(model: Any, rows: Sequence[list[int]], wanted: Sequence[Tensor]) -> Tensor:
    """Mean KL(adapter ‖ model), nats a token; both have the same LM head."""
    batch = pad_texts(rows, model.device)
    head = LMHead.of(model)
    with torch.enable_grad():
        with torch.autocast(model.device.type, torch.bfloat16, enabled=_computes_in_bf16(model.device)):
            states = hidden_states(model, batch["input_ids"], batch["attention_mask"])
        own = states.float()[batch["attention_mask"].bool()]
        return kl_divergence(torch.cat(list(wanted)), own, head, ref_head=head).mean()


def _computes_in_bf16(device: torch.device) -> bool:
    """Whether products are quicker in bf16 there; on other processors they would be emulated."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    known: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # which older versions do not say
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))
