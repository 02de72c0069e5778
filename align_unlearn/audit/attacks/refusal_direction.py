"""The direction along which forgotten prompts differ from others, taken out of every layer (arXiv:2406.11717).

A refusal that hangs on one direction falls with it. The direction is found on every second row; the rest is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from align_unlearn.audit.answers import Record
from align_unlearn.audit.attacks.bench import Bench, copied
from align_unlearn.audit.subjects import Subject
from align_unlearn.data.examples import Example
from align_unlearn.data.tokens import prompt_ids
from align_unlearn.modeling.forward import decoder_layers


def attack(name: str, subject: Subject, bench: Bench, *, depths: Sequence[float] = (0.4, 0.6, 0.8)) -> list[Record]:
    """The held-out rows asked of a copy that cannot write along the direction, found at each depth in turn."""
    taught, measured = bench.halves
    if not taught or not measured or not bench.benign:
        return []
    budget = f"difference of means over {len(taught)} and {len(bench.benign)} prompts, ablated in all layers"
    records = []
    for depth in depths:
        changed = copied(subject)
        direction = _mean(changed, [example for example, _ in taught], depth) - _mean(changed, bench.benign, depth)
        ablate(changed.model, direction)
        records += bench.measure(name, changed, f"found at depth {depth:g}", depth, budget, measured)
    return records


@torch.no_grad()
def _mean(subject: Subject, examples: Sequence[Example], depth: float) -> Tensor:
    """(H,) mean state at the last token of the prompts."""
    total: Tensor | None = None
    for example in examples:
        ids = torch.tensor([prompt_ids(subject.tokenizer, example)], device=subject.model.device)
        hidden = subject.model.base_model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
        state = hidden[round(depth * (len(hidden) - 1))][0, -1].float()
        total = state if total is None else total + state
    assert total is not None
    return total / len(examples)


def ablate(model: Any, direction: Tensor) -> None:
    """From now on no layer of the model writes along `direction` (H,)."""
    unit = direction / direction.norm().clamp(min=1e-8)

    def without(_: Any, __: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        own = unit.to(states.device, states.dtype)
        kept = states - (states @ own)[..., None] * own
        return (kept, *output[1:]) if isinstance(output, tuple) else kept

    model.get_input_embeddings().register_forward_hook(without)
    for layer in decoder_layers(model):
        layer.register_forward_hook(without)
