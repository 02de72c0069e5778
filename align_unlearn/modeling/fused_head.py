"""TRL's fused LM head, but only on the labelled positions.

TRL's preference trainers call `model(…, labels=…, fused_lm_head=True)` and read per-token figures from the result. Its
own implementation projects every position where there is no Triton, prompts and padding included: on a CPU it takes
longer than the transformer under it. This one keeps the contract and projects what is labelled, through the tiles of
`lm_head.py`.
"""

from __future__ import annotations

import types
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import FusedCausalLMOutput

from align_unlearn.modeling.forward import hidden_states
from align_unlearn.modeling.lm_head import TILE, LMHead, token_logps


class CompactHead:
    """What stands in the place of TRL's fused head, and what it computed last.

    Attributes:
        temperature: what logits are divided by: that of the sampling, in the online trainers.
        last_log_probs: (B, T - 1) of the last forward that had a gradient, detached: the policy's, not the reference's.
    """

    last_log_probs: Tensor

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature


def use_compact_head(model: Any, temperature: float = 1.0) -> CompactHead:
    """Replaces TRL's fused head on `model` (with or without adapters). Calling it again changes nothing.

    Args:
        temperature: log-probabilities are those of sampling at it, as in TRL's head.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if hasattr(base, "_compact_head"):
        known: CompactHead = base._compact_head
        return known
    plain_forward, head = base.forward, CompactHead(temperature)

    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return plain_forward(*args, **kwargs)
        batch = kwargs["input_ids"], kwargs["attention_mask"], kwargs["labels"]
        output = compact_output(self, *batch, temperature=head.temperature)
        if output.log_probs.requires_grad:
            head.last_log_probs = output.log_probs.detach()
        return output

    base.forward = types.MethodType(forward, base)
    base._compact_head = head
    return head


def compact_output(
    model: Any, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, *, temperature: float = 1.0
) -> FusedCausalLMOutput:
    """Per-token figures (B, T - 1) of the labelled tokens, 0 elsewhere; `log_probs` is differentiable."""
    targets = labels[:, 1:]
    mask = targets != -100
    head = replace(LMHead.of(model), temperature=temperature)
    hidden, chosen = hidden_states(model, input_ids, attention_mask)[:, :-1][mask], targets[mask]
    logps = token_logps(hidden, chosen, head)
    entropy, mean_logits, is_top1 = _figures(hidden.detach(), chosen, head)

    def spread(values: Tensor) -> Tensor:
        return values.new_zeros(mask.shape).masked_scatter(mask, values)

    return FusedCausalLMOutput(
        loss=-logps.sum() / mask.sum().clamp(min=1),
        log_probs=spread(logps),
        entropy=spread(entropy),
        mean_logits=spread(mean_logits),
        is_top1=spread(is_top1),
        label_mask=mask,
    )


@torch.no_grad()
def _figures(hidden: Tensor, labels: Tensor, head: LMHead) -> tuple[Tensor, Tensor, Tensor]:
    """Entropy, mean logit and whether the label has the highest logit, each (N,): what TRL logs."""
    none = hidden.new_empty(0, dtype=torch.float32)
    entropy, mean_logits, is_top1 = [none], [none], [none.bool()]
    for start in range(0, hidden.shape[0], TILE):
        z = head.logits(hidden[start : start + TILE])
        logp = z.log_softmax(-1)
        entropy.append(-(logp.exp() * logp).sum(-1))
        mean_logits.append(z.mean(-1))
        is_top1.append(z.argmax(-1) == labels[start : start + TILE])
    return torch.cat(entropy), torch.cat(mean_logits), torch.cat(is_top1)
