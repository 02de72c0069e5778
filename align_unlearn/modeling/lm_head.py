"""What the LM head says about a few positions, without the (batch, tokens, vocabulary) logits.

The head is frozen in adapter training, so the gradient of a per-position scalar (a token's log-probability, a
divergence over the vocabulary) with respect to that position's hidden state is known in the forward pass already. It
is stored there, (N, H) numbers, and the backward pass is one multiplication. Positions are projected in tiles: peak
memory is tile × vocabulary, whatever the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from align_unlearn.errors import UserError

TILE = 256


@dataclass(frozen=True)
class LMHead:
    """A frozen LM head: z = softcap·tanh(scale·(W h + b) / softcap) / T, or z = scale·(W h + b) / T without a softcap.

    Attributes:
        weight: (V, H).
        bias: (V,), or none.
        scale: what the logits are multiplied by (Cohere, Granite and others; 1 elsewhere).
        softcap: bound of the logits (Gemma 2), or none.
        temperature: T, where the head speaks of what was sampled at a temperature.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @classmethod
    def of(cls, model: Any) -> LMHead:
        """The head of a causal LM, with or without adapters.

        Raises:
            UserError: the head is trained, carries an adapter, or is quantised: its gradient would be lost.
        """
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        head = base.get_output_embeddings()
        weight = getattr(head, "weight", None)
        if not isinstance(head, torch.nn.Linear) or weight is None or not weight.is_floating_point():
            raise UserError(
                f"The LM head is not a plain linear layer ({type(head).__name__}).",
                fix="leave lm_head out of lora_target_modules and of quantisation",
            )
        if weight.requires_grad and hasattr(model, "peft_config"):
            raise UserError("The LM head is trained.", fix="leave lm_head out of lora_modules_to_save")
        config = base.config.get_text_config()
        return cls(weight.detach(), None if head.bias is None else head.bias.detach(), *_scaling(config))

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, H) → (N, V), at least fp32; the product itself is in the weights' dtype, as the model computes it."""
        product = functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        z = product.float() if product.dtype in (torch.bfloat16, torch.float16) else product
        z = z * self.scale if self.scale != 1.0 else z
        z = self.softcap * torch.tanh(z / self.softcap) if self.softcap else z
        return z / self.temperature if self.temperature != 1.0 else z

    def pull_back(self, grad: Tensor, logits: Tensor) -> Tensor:
        """dL/dz (N, V) → dL/dh (N, H): through temperature, softcap, scale and weight."""
        return self.slopes(grad, logits).to(self.weight.dtype) @ self.weight

    def slopes(self, grad: Tensor, logits: Tensor) -> Tensor:
        """dL/dz (N, V) → dL/d(W h) (N, V): through temperature, softcap and scale."""
        if self.softcap:
            grad = grad * (1 - (logits * self.temperature / self.softcap) ** 2)
        return grad * (self.scale / self.temperature)


def token_logps(hidden: Tensor, labels: Tensor, head: LMHead, tile: int = TILE) -> Tensor:
    """Log-probability of each label.

    Args:
        hidden: (N, H) final hidden states of the positions that predict the labels.
        labels: (N,) token ids.
        head: the frozen head.
        tile: positions projected at once.

    Returns:
        (N,) nats, at least fp32, differentiable in `hidden`.
    """

    def measure(piece: slice, wants_grad: bool) -> tuple[Tensor, Tensor | None]:
        z = head.logits(hidden[piece])
        logp = z - z.logsumexp(-1, keepdim=True)
        chosen = labels[piece, None]
        value = logp.gather(-1, chosen)[:, 0]
        if not wants_grad:
            return value, None
        grad = logp.exp_().neg_()
        grad.scatter_add_(-1, chosen, torch.ones_like(chosen, dtype=grad.dtype))
        return value, head.pull_back(grad, z)

    return per_position(hidden, measure, tile)


def kl_divergence(
    ref_hidden: Tensor, hidden: Tensor, head: LMHead, tile: int = TILE, *, ref_head: LMHead | None = None
) -> Tensor:
    """Exact KL(reference ‖ policy) over the whole vocabulary at each position.

    Args:
        ref_hidden: (N, H) final hidden states of the reference; no gradient flows there.
        hidden: (N, H) final hidden states of the policy.
        head: the frozen head of the policy.
        tile: positions projected at once.
        ref_head: the reference's head where it is another; the vocabulary is the same.

    Returns:
        (N,) nats, at least fp32, differentiable in `hidden`.
    """
    other = ref_head or head

    def measure(piece: slice, wants_grad: bool) -> tuple[Tensor, Tensor | None]:
        z = head.logits(hidden[piece])
        logp = z.log_softmax(-1)
        ref_logp = other.logits(ref_hidden[piece].detach()).log_softmax(-1)
        ref = ref_logp.exp()
        value = (ref * (ref_logp - logp)).sum(-1)
        return value, (head.pull_back(logp.exp_().sub_(ref), z) if wants_grad else None)

    return per_position(hidden, measure, tile)


Measure = Callable[[slice, bool], "tuple[Tensor, Tensor | None]"]


def per_position(hidden: Tensor, measure: Measure, tile: int) -> Tensor:
    """A scalar a position, from what `measure` says of each tile: its values and, if asked, their gradients.

    Args:
        hidden: (N, H); its gradient is what `measure` gave.
        measure: called with a slice of positions and whether a gradient is wanted; (n,) and (n, H) or none.
        tile: positions in a slice.

    Returns:
        (N,).
    """
    values: Tensor = _PerPosition.apply(hidden, measure, tile)  # type: ignore[no-untyped-call]
    return values


class _PerPosition(torch.autograd.Function):
    """A scalar a position, computed tile by tile, whose gradient with respect to `hidden` is stored on the way."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, measure: Measure, tile: int) -> Tensor:
        wants_grad = ctx.needs_input_grad[0]
        values, grads = [hidden.new_empty(0, dtype=torch.promote_types(hidden.dtype, torch.float32))], []
        for start in range(0, hidden.shape[0], tile):
            value, grad = measure(slice(start, start + tile), wants_grad)
            values.append(value)
            if grad is not None:
                grads.append(grad)
        if wants_grad:
            ctx.save_for_backward(torch.cat(grads) if grads else torch.zeros_like(hidden))
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, None, None]:
        (grad,) = ctx.saved_tensors
        return (upstream[0][:, None] * grad).to(grad.dtype), None, None


def _scaling(config: Any) -> tuple[float, float | None]:
    """The logit multiplier and the softcap of a configuration, under the names that model families give them."""
    softcap = getattr(config, "final_logit_softcapping", None)
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name)), softcap
    if getattr(config, "logits_scaling", None) is not None:
        scaling = float(config.logits_scaling)
        return (scaling if config.model_type == "hyperclovax" else 1.0 / scaling), softcap
    return 1.0, softcap
