"""Gradient surgery: what of the forget gradient opposes the retain gradient is taken out before the step.

Where g_forget · g_retain < 0, g_forget loses its component along g_retain (GRU, Wang et al. 2025, arXiv:2503.09117;
PCGrad, Yu et al. 2020, arXiv:2001.06782, with retaining given the right of way). A plain gradient step then never
raises the retain loss to first order; Adam's scaling and momentum make that approximate.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class GradientSurgery:
    """Keeps the retain gradient apart while micro-batches accumulate, and joins the two before the step.

    Args:
        parameters: the trainable ones.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.cosine = 0.0
        self._retain: list[Tensor | None] = [None] * len(self.parameters)
        self._pending = False

    def add_retain(self, loss: Tensor, share: float) -> None:
        """Adds the gradient of a micro-batch's retain loss.

        Args:
            loss: the weighted retain term; its graph is consumed.
            share: of the step's gradient that this micro-batch makes up.
        """
        grads = torch.autograd.grad(loss * share, self.parameters, allow_unused=True)
        for at, grad in enumerate(grads):
            if grad is not None:
                held = self._retain[at]
                self._retain[at] = grad if held is None else held + grad
        self._pending = True

    @torch.no_grad()
    def operate(self) -> None:
        """Makes each parameter's `.grad` the projected forget gradient plus the retain gradient. Once a step."""
        if not self._pending:
            return
        forget = [_flat(parameter.grad, parameter) for parameter in self.parameters]
        retain = [_flat(grad, parameter) for grad, parameter in zip(self._retain, self.parameters, strict=True)]
        along = sum(float(f @ r) for f, r in zip(forget, retain, strict=True))
        square = sum(float(r @ r) for r in retain)
        length = sum(float(f @ f) for f in forget)
        self.cosine = along / (square * length) ** 0.5 if square and length else 0.0
        factor = along / square if along < 0 else 0.0
        for parameter, f, r in zip(self.parameters, forget, retain, strict=True):
            parameter.grad = (f + (1 - factor) * r).view_as(parameter)
        self._retain = [None] * len(self.parameters)
        self._pending = False


def _flat(grad: Tensor | None, parameter: nn.Parameter) -> Tensor:
    return (torch.zeros_like(parameter) if grad is None else grad).reshape(-1)
