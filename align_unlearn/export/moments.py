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

from align_unlearn.data.batches import pad_texts
from align_unlearn.export.answer_states import answer_states_with_gradient
from align_unlearn.export.calibration import Text
from align_unlearn.modeling.generate import progress_bar
from align_unlearn.modeling.lm_head import LMHead
from align_unlearn.modeling.round_trip import linear_layers

BATCH = 8


def moments(model: Any, texts: Sequence[Text], seed: int = 0) -> dict[str, Tensor]:
    """By linear layer of a plain model, (in, in) Σ ‖∂ℓ/∂y‖² x xᵀ over its inputs x and outputs y, fp32.

    ℓ is the log-likelihood of tokens that the model itself draws where the texts are answered, so that the sum is the
    Fisher information of the layer's weight, in the mean over its rows.

    Args:
        model: a plain model; left as it was.
        texts: whose answers count.
        seed: of the tokens that are drawn.
    """
    found: dict[str, Tensor] = {}
    mask = torch.empty(0)

    def add(name: str, inputs: Tensor, slopes: Tensor) -> None:
        states = inputs[mask].float() * slopes[mask].float().norm(dim=-1, keepdim=True)
        sums = states.T @ states
        found[name] = found[name].add_(sums) if name in found else sums

    generator = torch.Generator(model.device).manual_seed(seed)
    head = LMHead.of(model)
    with _watched(model, add), progress_bar() as progress:
        bar = progress.add_task("what matters to the answers", total=len(texts))
        for start in range(0, len(texts), BATCH):
            piece = texts[start : start + BATCH]
            mask = pad_texts([text.tokens.input_ids for text in piece], model.device)["attention_mask"].bool()
            logits = head.logits(torch.cat(answer_states_with_gradient(model, piece)))
            drawn = _drawn(logits.detach(), generator)
            torch.nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()  # type: ignore[no-untyped-call]
            progress.advance(bar, len(piece))
    return found


def _drawn(logits: Tensor, generator: torch.Generator) -> Tensor:
    """(N,) a token for each row, by its probabilities."""
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


@contextmanager
def _watched(model: Any, add: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Within the block, `add` is told inputs and outputs' gradients of every linear layer; no weight has one."""

    def watch(name: str) -> Any:
        def hook(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            output.register_hook(lambda slopes: add(name, inputs[0].detach(), slopes))  # type: ignore[no-untyped-call]

        return hook

    asks = [each.requires_grad for each in model.parameters()]
    model.requires_grad_(False)
    hooks = [layer.register_forward_hook(watch(name)) for name, layer in linear_layers(model).items()]
    embedding = model.get_input_embeddings()
    hooks.append(embedding.register_forward_hook(lambda _, __, output: output.requires_grad_(True)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, before in zip(model.parameters(), asks, strict=True):
            parameter.requires_grad_(before)
