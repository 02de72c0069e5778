"""Which directions of a layer's inputs matter to what the model says: what rounding must keep in mind.

GPTQ counts every token alike. But what a template's words do to a layer is of no concern to the answer, and a token
that all others look at is of much: each counts by how strongly the answers' likelihood depends on the layer's output
there (GuidedQuant, arXiv:2505.07004, eq. 7, with all output channels in one group).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from align_unlearn.export.answer_states import answer_states_with_gradient
from align_unlearn.export.calibration import Text
from align_unlearn.modeling.forward import frozen
from align_unlearn.modeling.generate import progress_bar
from align_unlearn.modeling.lm_head import TILE, LMHead, token_logps
from align_unlearn.modeling.round_trip import linear_layers

BATCH = 8


def moments(model: Any, texts: Sequence[Text], seed: int = 0) -> dict[str, Tensor]:
    """By linear layer of a plain model, (in, in) Σ ‖∂ℓ/∂y‖² x xᵀ over its inputs x and outputs y, fp32.

    ℓ is the log-likelihood of one token that the model itself draws at each place of the answers, so that this
    estimates the Fisher information of the layer's rows, summed over them, without what two tokens have in common.
    Zeros for a layer on which no answer depends.

    Args:
        model: a plain model; left as it was.
        texts: whose answers count.
        seed: of the tokens that are drawn.
    """
    found = {name: torch.zeros(layer.in_features, layer.in_features, device=layer.weight.device)
             for name, layer in linear_layers(model).items()}  # fmt: skip

    def add(name: str, inputs: Tensor, slopes: Tensor) -> None:
        # padding stands on the right, where nothing depends on it: its slopes are zero
        states = inputs.flatten(0, -2).float() * slopes.flatten(0, -2).float().norm(dim=-1, keepdim=True)
        found[name].addmm_(states.T, states)

    generator = torch.Generator(model.device).manual_seed(seed)
    head = LMHead.of(model)
    with frozen(model), _watched(model, add), progress_bar() as progress:
        bar = progress.add_task("what matters to the answers", total=len(texts))
        for start in range(0, len(texts), BATCH):
            piece = texts[start : start + BATCH]
            states = torch.cat(answer_states_with_gradient(model, piece))
            drawn = _drawn(states.detach(), head, generator)
            token_logps(states, drawn, head).sum().backward()  # type: ignore[no-untyped-call]
            progress.advance(bar, len(piece))
    return found


@torch.no_grad()
def _drawn(states: Tensor, head: LMHead, generator: torch.Generator) -> Tensor:
    """(N,) a token for each of (N, H) states, by its probabilities."""
    tiles = (head.logits(tile).softmax(-1) for tile in torch.split(states, TILE))
    return torch.cat([torch.multinomial(tile, 1, generator=generator)[:, 0] for tile in tiles])


@contextmanager
def _watched(model: Any, add: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Within the block, `add` is told the inputs and the outputs' gradients of every linear layer that has any."""

    def watch(name: str) -> Any:
        def hook(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(lambda slopes: add(name, inputs[0].detach(), slopes))  # type: ignore[no-untyped-call]

        return hook

    hooks = [layer.register_forward_hook(watch(name)) for name, layer in linear_layers(model).items()]
    embedding = model.get_input_embeddings()
    hooks.append(embedding.register_forward_hook(lambda _, __, output: output.requires_grad_(True)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
