"""`CompletionView`: what an objective may look at, computed when touched and never before.

An objective that needs no reference never pays for one; one that looks at log-probabilities never sees logits.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from align_unlearn.modeling.forward import hidden_states
from align_unlearn.modeling.lm_head import LMHead, kl_divergence, token_logps
from align_unlearn.modeling.roles import original

IGNORE = -100


class CompletionView:
    """A batch of completions as the policy and the original see it.

    Positions are those that predict: column t of every (B, T) tensor speaks of token t + 1 of the input, so T is the
    width of the batch less one. Columns that predict no labelled token are 0 in every tensor and False in `mask`; they
    are not projected through the LM head at all.

    Args:
        model: the policy, adapters on.
        input_ids: (B, T + 1) token ids.
        attention_mask: (B, T + 1).
        labels: (B, T + 1), -100 where a token is not trained on.
        ref_logps: (B, T) log-probabilities under the original, if they were computed before.
    """

    def __init__(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        ref_logps: Tensor | None = None,
    ) -> None:
        self.model = model
        self.input_ids = input_ids
        self.attention_mask = attention_mask
        self._targets = labels[:, 1:]
        self.mask = self._targets != IGNORE
        self._ref_logps = ref_logps

    @cached_property
    def head(self) -> LMHead:
        """The LM head that policy and original share."""
        return LMHead.of(self.model)

    @cached_property
    def lengths(self) -> Tensor:
        """(B,) number of labelled tokens of each row, at least 1."""
        return self.mask.sum(-1).clamp(min=1)

    @cached_property
    def hidden(self) -> Tensor:
        """(N, H) final hidden states of the policy at the N labelled positions, row after row."""
        return hidden_states(self.model, self.input_ids, self.attention_mask)[:, :-1][self.mask]

    @cached_property
    def ref_hidden(self) -> Tensor:
        """(N, H) final hidden states of the original at the same positions; no gradient."""
        with original(self.model):
            return hidden_states(self.model, self.input_ids, self.attention_mask)[:, :-1][self.mask]

    @cached_property
    def logps(self) -> Tensor:
        """(B, T) log-probability of each labelled token under the policy, nats."""
        return self._spread(token_logps(self.hidden, self._labels, self.head))

    @cached_property
    def ref_logps(self) -> Tensor:
        """(B, T) the same under the original; no gradient. Taken from the cache where there is one."""
        if self._ref_logps is not None:
            return self._ref_logps
        with torch.no_grad():
            return self._spread(token_logps(self.ref_hidden, self._labels, self.head))

    @cached_property
    def kl(self) -> Tensor:
        """(B, T) exact full-vocabulary KL(original ‖ policy) at each labelled position, nats."""
        return self._spread(kl_divergence(self.ref_hidden, self.hidden, self.head))

    @cached_property
    def logits(self) -> Tensor:
        """(N, V) logits of the policy at the labelled positions. The one expensive thing here."""
        return self.head.logits(self.hidden)

    @cached_property
    def _labels(self) -> Tensor:
        return self._targets[self.mask]

    def _spread(self, values: Tensor) -> Tensor:
        """(N,) values back to their places in (B, T)."""
        return values.new_zeros(self.mask.shape).masked_scatter(self.mask, values)
