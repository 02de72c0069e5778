"""How much each token of the calibration texts counts to each layer: what rounding must keep in mind.

GPTQ counts every token alike. But what a template's words do to a layer is of no concern to the answer, and a token
that all others look at is of much: each counts by how strongly the answers' likelihood depends on the layer's output
there (GuidedQuant, arXiv:2505.07004, eq. 7, with all output channels in one group).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Weighed:
    """A batch of calibration texts.

    Attributes:
        texts: of about the same length.
        weights: by linear layer on whose output an answer depends, (rows,) ‖∂ℓ/∂y‖ over the rows of its input.
    """

    texts: list[Text]
    weights: dict[str, Tensor]


def weighed(model: Any, texts: Sequence[Text], seed: int = 0) -> list[Weighed]:
    """The texts in batches, with what each of their tokens counts to the linear layers of a plain model.

    ℓ is the log-likelihood of one token that the model itself draws at each place of the answers, so that the sum of
    ‖∂ℓ/∂y‖² x xᵀ over a layer's inputs x and outputs y estimates the Fisher information of its rows, summed over them,
    without what two tokens have in common.

    Args:
        model: a plain model; left as it was.
        texts: whose answers count.
        seed: of the tokens that are drawn.
    """
    by_length = sorted(texts, key=lambda text: len(text.tokens.input_ids))
    generator = torch.Generator(model.device).manual_seed(seed)
    head, found, slopes = LMHead.of(model), [], dict[str, list[Tensor]]()
    # padding stands on the right, where nothing depends on it: its slopes are zero
    with frozen(model), _watched(model, slopes), progress_bar() as progress:
        bar = progress.add_task("what matters to the answers", total=len(texts))
        for start in range(0, len(texts), BATCH):
            piece = by_length[start : start + BATCH]
            slopes.clear()
            states = torch.cat(answer_states_with_gradient(model, piece))
            drawn = _drawn(states.detach(), head, generator)
            token_logps(states, drawn, head).sum().backward()  # type: ignore[no-untyped-call]
            found.append(Weighed(piece, {name: torch.cat(own[::-1]) for name, own in slopes.items()}))
            progress.advance(bar, len(piece))
    return found


@torch.no_grad()
def _drawn(states: Tensor, head: LMHead, generator: torch.Generator) -> Tensor:
    """(N,) a token for each of (N, H) states, by its probabilities."""
    tiles = (head.logits(tile).softmax(-1) for tile in torch.split(states, TILE))
    return torch.cat([torch.multinomial(tile, 1, generator=generator)[:, 0] for tile in tiles])


@contextmanager
def _watched(model: Any, found: dict[str, list[Tensor]]) -> Iterator[None]:
    """Within the block, takes in by linear layer the norm of the gradient of each row of its output.

    A layer that is called more than once has the last call's first, as gradients come.
    """

    def watch(name: str) -> Any:
        def keep(slopes: Tensor) -> None:
            found.setdefault(name, []).append(slopes.flatten(0, -2).float().norm(dim=-1))

        def hook(_: Any, __: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(keep)  # type: ignore[no-untyped-call]

        return hook

    hooks = [layer.register_forward_hook(watch(name)) for name, layer in linear_layers(model).items()]
    embedding = model.get_input_embeddings()
    hooks.append(embedding.register_forward_hook(lambda _, __, output: output.requires_grad_(True)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
