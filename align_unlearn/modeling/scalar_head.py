"""A number from a hidden state: what a critic says of each token, a reward model of a whole answer.

The transformer under it is the shared base with an adapter of its own; the head is (H,) weights and a bias in fp32. It
begins at zero, so that a critic that has learned nothing says 0 and not noise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from align_unlearn.errors import UserError
from align_unlearn.modeling.forward import hidden_states

REWARD_HEAD = "reward_head.safetensors"
"""Beside the adapter of a reward model."""


class ScalarHead(torch.nn.Module):
    """w·h + b, in fp32, zero at first.

    Args:
        width: H, the width of the hidden states.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(width))
        self.bias = torch.nn.Parameter(torch.zeros(()))

    def forward(self, hidden: Tensor) -> Tensor:
        """(…, H) → (…)."""
        return hidden.float() @ self.weight + self.bias

    def save(self, file: Path) -> None:
        """Writes the head as safetensors."""
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, file)

    def load(self, file: Path) -> None:
        """Takes the head that `save` wrote.

        Raises:
            UserError: there is none, or it is of another width.
        """
        if not file.is_file():
            raise UserError("The scalar head is missing.", where=str(file))
        found = load_file(file)
        if set(found) != {"weight", "bias"} or found["weight"].shape != self.weight.shape:
            raise UserError(
                f"The head is not one of width {self.weight.shape[0]}.", where=str(file), fix="the base it was made on"
            )
        self.load_state_dict(found)


def head_for(model: Any) -> ScalarHead:
    """A new head for the hidden states of a causal LM, on its device."""
    return ScalarHead(model.config.get_text_config().hidden_size).to(model.device)


def last_scores(model: Any, head: ScalarHead, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The head at each row's last token; rows are padded on the right.

    Args:
        model: a causal LM; the adapters that are on take part.
        input_ids: (B, T).
        attention_mask: (B, T).

    Returns:
        (B,).
    """
    hidden = hidden_states(model, input_ids, attention_mask)
    last = attention_mask.sum(-1) - 1
    scores: Tensor = head(hidden[torch.arange(len(last), device=last.device), last])
    return scores
