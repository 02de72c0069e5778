"""The states from which a text's answer is foretold: what is served is what must stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from align_unlearn.data.batches import pad_texts
from align_unlearn.export.calibration import Text
from align_unlearn.modeling.forward import hidden_states, quick_products


def answer_states(model: Any, texts: Sequence[Text]) -> list[Tensor]:
    """Of each text, (tokens + 1, H) final hidden states where its answer and what follows are foretold.

    How a template's words are foretold is nobody's concern.
    """
    batch = pad_texts([text.tokens.input_ids for text in texts], model.device)
    states = hidden_states(model, batch["input_ids"], batch["attention_mask"])
    masks = batch["attention_mask"].bool()
    return [own[mask][len(text.tokens.prompt_ids) - 1 :] for own, mask, text in zip(states, masks, texts, strict=True)]


def answer_states_with_gradient(model: Any, texts: Sequence[Text]) -> list[Tensor]:
    """The same, for a loss to be taken of them, fp32; products in bf16 where the device has them."""
    with torch.enable_grad(), quick_products(model.device):
        return [own.float() for own in answer_states(model, texts)]
