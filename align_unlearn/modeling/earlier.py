"""Requests that follow each other: the updates of earlier runs, held in their places beneath the adapter of this one.

The base of a later request is the model that has forgotten the earlier ones. Merged into 4-bit weights that update
would be gone, so it stays beside them: each layer adds scale · B A x of every earlier adapter to its output, adapters
of this run off or on. Each stays a file of its own, so that a request can be withdrawn by leaving its adapter out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from align_unlearn.errors import UserError
from align_unlearn.modeling.adapter_file import Updates, read_updates


def adapter_folder(path: str | Path) -> Path:
    """The adapter of a run, or the folder itself where it is one.

    Raises:
        UserError: there is no adapter.
    """
    for place in (Path(path) / "adapter", Path(path)):
        if (place / "adapter_config.json").is_file():
            return place
    raise UserError(
        "There is no adapter here.", where=f"after: {path}", fix="name a finished run, or an adapter's folder"
    )


def attach(model: Any, paths: Sequence[str | Path]) -> None:
    """Adds the updates of earlier adapters to the layers of a base model, for good and without gradient.

    Raises:
        UserError: one is no plain LoRA adapter, or changes a layer that the model does not have.
    """
    layers = dict(model.named_modules())
    for at, path in enumerate(paths):
        updates = read_updates(adapter_folder(path))
        if updates is None:
            raise UserError("Only plain LoRA adapters can lie beneath another.", where=str(path))
        if missing := [name for name in updates.layers if name not in layers]:
            raise UserError(f"The model has no layer {missing[0]}.", where=str(path))
        if any(layers[name] is model.get_output_embeddings() for name in updates.layers):
            raise UserError("An adapter on the LM head cannot lie beneath another.", where=str(path))
        for name in updates.layers:
            _add(layers[name], updates, name, at)


@contextlib.contextmanager
def standing_on(model: Any, count: int | None) -> Iterator[None]:
    """Within the block only the first `count` of the earlier runs lie beneath the model; all, where none is given."""
    layers = [module for module in model.modules() if hasattr(module, "earlier_runs")]
    every = [layer.earlier_runs for layer in layers]
    for layer, runs in zip(layers, every, strict=True):
        layer.earlier_runs = [run for run in runs if count is None or run < count]
    try:
        yield
    finally:
        for layer, runs in zip(layers, every, strict=True):
            layer.earlier_runs = runs


def _add(layer: Any, updates: Updates, name: str, run: int) -> None:
    a, b = updates.factors(name)
    device = next(layer.parameters()).device
    layer.register_buffer(f"earlier_a_{run}", a.to(device), persistent=False)
    layer.register_buffer(f"earlier_b_{run}", (updates.layers[name] * b).to(device), persistent=False)
    if not hasattr(layer, "earlier_runs"):
        layer.earlier_runs = []
        layer.register_forward_hook(_output)
    layer.earlier_runs.append(run)


def _held(layer: Any) -> list[tuple[Tensor, Tensor]]:
    return [(getattr(layer, f"earlier_a_{run}"), getattr(layer, f"earlier_b_{run}"))
            for run in getattr(layer, "earlier_runs", ())]  # fmt: skip


def _output(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    for a, b in _held(layer):
        output = output + (inputs[0].to(a.dtype) @ a.T @ b.T).to(output.dtype)
    return output


def earlier_update(layer: nn.Module) -> Tensor | None:
    """The sum of the earlier updates of a layer, fp32; none where it has none."""
    held = _held(layer)
    return torch.stack([b @ a for a, b in held]).sum(0) if held else None
