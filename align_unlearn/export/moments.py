"""Which directions of a layer's inputs matter to what the model says: what rounding must keep in mind.

GPTQ counts every token alike. But what a template's words do to a layer is of no concern to the answer, and a token
that all others look at is of much: each counts by how strongly the answers' likelihood depends on the layer's output
there (GuidedQuant, arXiv:2505.07004, eq. 7, with all output channels in one group). Embeddings and LM head are told of
in the same unit, so that it can be seen where bits are worth most.
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
from align_unlearn.modeling.round_trip import linear_layers, vocabulary_tables

BATCH = 8


def moments(model: Any, texts: Sequence[Text], seed: int = 0) -> dict[str, Tensor]:
    """By linear layer of a plain model, (in, in) Σ ‖∂ℓ/∂y‖² x xᵀ over its inputs x and outputs y, fp32.

    So for the LM head too. What an embedding does to the answers is of one row each time, and has no input: by its name
    stands (H, H) Σ (∂ℓ/∂y) (∂ℓ/∂y)ᵀ, and the LM head's sum with it where the two are one weight.

    ℓ is the log-likelihood of one token that the model itself draws at each place of the answers, so that this
    estimates the Fisher information of the layer's rows, summed over them, without what two tokens have in common.
    Zeros for a layer on which no answer depends.

    Args:
        model: a plain model; left as it was.
        texts: whose answers count.
        seed: of the tokens that are drawn.
    """
    tables = vocabulary_tables(model)
    embedding, lm_head = next(iter(tables)), next(reversed(tables))  # the same name where they are one weight
    widths = {name: own.weight for name, own in [*linear_layers(model).items(), *tables.items()]}
    found = {name: own.new_zeros(own.shape[1], own.shape[1], dtype=torch.float32) for name, own in widths.items()}

    def add(name: str, inputs: Tensor, slopes: Tensor) -> None:
        # padding stands on the right, where nothing depends on it: its slopes are zero
        states = inputs.flatten(0, -2).float() * slopes.flatten(0, -2).float().norm(dim=-1, keepdim=True)
        found[name].addmm_(states.T, states)

    def add_row(slopes: Tensor) -> None:
        own = slopes.flatten(0, -2).float() * getattr(model.get_input_embeddings(), "embed_scale", 1.0)  # Gemma's
        found[embedding].addmm_(own.T, own)

    generator = torch.Generator(model.device).manual_seed(seed)
    head = LMHead.of(model)
    with frozen(model), _watched(model, add, add_row), progress_bar() as progress:
        bar = progress.add_task("what matters to the answers", total=len(texts))
        for start in range(0, len(texts), BATCH):
            piece = texts[start : start + BATCH]
            states = torch.cat(answer_states_with_gradient(model, piece))
            drawn = _drawn(states.detach(), head, generator)
            token_logps(states, drawn, head).sum().backward()  # type: ignore[no-untyped-call]
            for tile, labels in zip(torch.split(states.detach(), TILE), torch.split(drawn, TILE), strict=True):
                add(lm_head, tile, _slopes_of_the_head(tile, labels, head))
            progress.advance(bar, len(piece))
    return found


@torch.no_grad()
def _slopes_of_the_head(states: Tensor, labels: Tensor, head: LMHead) -> Tensor:
    """(N, V) ∂ℓ/∂(W h) of the labels' log-likelihood at (N, H) states."""
    logits = head.logits(states)
    grad = logits.softmax(-1).neg_()
    grad.scatter_add_(-1, labels[:, None], torch.ones_like(labels[:, None], dtype=grad.dtype))
    return head.slopes(grad, logits)


@torch.no_grad()
def _drawn(states: Tensor, head: LMHead, generator: torch.Generator) -> Tensor:
    """(N,) a token for each of (N, H) states, by its probabilities."""
    tiles = (head.logits(tile).softmax(-1) for tile in torch.split(states, TILE))
    return torch.cat([torch.multinomial(tile, 1, generator=generator)[:, 0] for tile in tiles])


@contextmanager
def _watched(
    model: Any, add: Callable[[str, Tensor, Tensor], None], add_row: Callable[[Tensor], None]
) -> Iterator[None]:
    """Within the block, `add` is told the inputs and the outputs' gradients of every linear layer that has any, and
    `add_row` the gradients of what was read from the embedding."""

    def watch(name: str) -> Any:
        def hook(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(lambda slopes: add(name, inputs[0].detach(), slopes))  # type: ignore[no-untyped-call]

        return hook

    hooks = [layer.register_forward_hook(watch(name)) for name, layer in linear_layers(model).items()]

    def watch_rows(_: Any, __: Any, output: Tensor) -> None:
        output.requires_grad_(True)
        output.register_hook(add_row)  # type: ignore[no-untyped-call]

    hooks.append(model.get_input_embeddings().register_forward_hook(watch_rows))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
