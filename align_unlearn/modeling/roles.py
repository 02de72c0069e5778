"""One base, several roles: who speaks is decided by which adapter is on.

The original model is the base with adapters off, bitwise (adapters add nothing, not even a zero). This is the one
place that knows how PEFT switches adapters and what that does to `requires_grad` and to gradient checkpointing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from align_unlearn.errors import UserError

POLICY = "default"
"""PEFT's name of the adapter that is trained to forget; what a run saves and what is merged."""


@contextlib.contextmanager
def original(model: Any) -> Iterator[Any]:
    """Within the block, `model` is the untouched base: adapters off, no gradient, no gradient checkpointing.

    Raises:
        UserError: `model` carries no adapter, so that there is nothing to switch off.
    """
    if not hasattr(model, "disable_adapter"):
        raise UserError(
            "The original model is the base with adapters off, but this model has no adapter.",
            fix="train with LoRA (--use_peft true); full fine-tuning overwrites the original",
        )
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        with evaluating(model), torch.no_grad(), model.disable_adapter():
            yield model
    finally:
        _restore(model, flags)


@contextlib.contextmanager
def role(model: Any, name: str) -> Iterator[Any]:
    """Within the block, adapter `name` is the active one. Run its forward **and its backward** in here.

    PEFT freezes inactive adapters when it switches, and gradient checkpointing recomputes under whichever adapter is
    active at that time; a backward outside of the block would silently lose or falsify gradients. Which parameters
    are trainable is the same before, within and after.

    Raises:
        UserError: there is no adapter of that name.
    """
    if name not in getattr(model, "peft_config", {}):
        raise UserError(f"No adapter plays the role '{name}'.", fix=f"one of: {sorted(model.peft_config)}")
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    before = model.active_adapter
    model.set_adapter(name)
    _restore(model, flags)
    try:
        yield model
    finally:
        model.set_adapter(before)
        _restore(model, flags)


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[Any]:
    """Within the block, `model` is in evaluation mode; it returns to what it was."""
    training = model.training
    model.eval()
    try:
        yield model
    finally:
        model.train(training)


def _restore(model: Any, flags: dict[str, bool]) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad != flags.get(name, parameter.requires_grad):
            parameter.requires_grad_(flags[name])
