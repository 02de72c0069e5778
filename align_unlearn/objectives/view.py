"""`CompletionView`: what an objective may look at, computed when touched and never before.

An objective that needs no reference never pays for one; one that looks at log-probabilities never sees logits.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from align_unlearn.data.tokens import IGNORE
from align_unlearn.errors import UserError
from align_unlearn.modeling.forward import hidden_states, layer_states
from align_unlearn.modeling.lm_head import LMHead, kl_divergence, token_logps
from align_unlearn.modeling.roles import original


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
        ref_hidden: (N, H) final hidden states of the original at the labelled positions, likewise.
        chosen: the view of what should be said in place of these completions, where rows have that.
    """

    def __init__(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        ref_logps: Tensor | None = None,
        ref_hidden: Tensor | None = None,
        chosen: CompletionView | None = None,
    ) -> None:
        self.model = model
        self.input_ids = input_ids
        self.attention_mask = attention_mask
        self._targets = labels[:, 1:]
        self.mask = self._targets != IGNORE
        self._ref_logps = ref_logps
        self._ref_hidden = ref_hidden
        self._chosen = chosen

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
        """(N, H) final hidden states of the original at the same positions; no gradient. Taken from the cache."""
        if self._ref_hidden is not None:
            return self._ref_hidden.to(self.hidden.device)
        with original(self.model):
            return hidden_states(self.model, self.input_ids, self.attention_mask)[:, :-1][self.mask]

    @cached_property
    def logps(self) -> Tensor:
        """(B, T) log-probability of each labelled token under the policy, nats."""
        return self.spread(token_logps(self.hidden, self.labels, self.head))

    @cached_property
    def ref_logps(self) -> Tensor:
        """(B, T) the same under the original; no gradient. Taken from the cache where there is one."""
        if self._ref_logps is not None:
            return self._ref_logps
        with torch.no_grad():
            return self.spread(token_logps(self.ref_hidden, self.labels, self.head))

    @cached_property
    def kl(self) -> Tensor:
        """(B, T) exact full-vocabulary KL(original ‖ policy) at each labelled position, nats."""
        return self.spread(kl_divergence(self.ref_hidden, self.hidden, self.head))

    @property
    def chosen(self) -> CompletionView:
        """The view of the chosen answers, row by row beside these.

        Raises:
            UserError: the rows have none.
        """
        if self._chosen is None:
            raise UserError("This objective needs a chosen answer beside each row to forget.", where="forget_dataset")
        return self._chosen

    def layer(self, at: int) -> Tensor:
        """(N, H) output of decoder layer `at` (from 0) of the policy at the labelled positions."""
        return layer_states(self.model, at, self.input_ids, self.attention_mask)[:, :-1][self.mask]

    def ref_layer(self, at: int) -> Tensor:
        """(N, H) the same of the original; no gradient."""
        with original(self.model):
            return layer_states(self.model, at, self.input_ids, self.attention_mask)[:, :-1][self.mask]

    @cached_property
    def logits(self) -> Tensor:
        """(N, V) logits of the policy at the labelled positions. The one expensive thing here."""
        return self.head.logits(self.hidden)

    @cached_property
    def labels(self) -> Tensor:
        """(N,) the labelled tokens, row after row."""
        return self._targets[self.mask]

    def spread(self, values: Tensor) -> Tensor:
        """(N,) values back to their places in (B, T)."""
        return values.new_zeros(self.mask.shape).masked_scatter(self.mask, values)
