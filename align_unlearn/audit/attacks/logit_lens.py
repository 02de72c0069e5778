"""The text as it stands in the layers below the last: each layer's states read by the final norm and the LM head.

A model that only hides what it knows at its end shows it here (arXiv:2309.17410).
"""

from __future__ import annotations

from typing import Any

import torch

from align_unlearn.audit.answers import Record
from align_unlearn.audit.attacks.bench import Bench, about
from align_unlearn.audit.subjects import Subject
from align_unlearn.data.batches import pad_rows
from align_unlearn.data.tokens import IGNORE
from align_unlearn.errors import UserError
from align_unlearn.modeling.lm_head import LMHead, token_logps


@torch.no_grad()
def attack(name: str, subject: Subject, bench: Bench, *, every: int = 1) -> list[Record]:
    """The probability of each row's text, read off every `every`-th layer from the last one down."""
    records = []
    with subject.speaking() as model:
        head, norm = LMHead.of(model), final_norm(model)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        for example, tokens in bench.forget:
            batch = pad_rows([{"input_ids": tokens.input_ids, "labels": tokens.labels}], 0)
            targets = batch["labels"][:, 1:]
            mask = targets != IGNORE
            output = base.base_model(
                input_ids=batch["input_ids"].to(base.device), output_hidden_states=True, use_cache=False
            )
            depth = len(output.hidden_states) - 1
            for layer in range(depth, 0, -every):
                # the last entry has passed the norm already
                states = output.hidden_states[layer] if layer == depth else norm(output.hidden_states[layer])
                logps = token_logps(states[:, :-1][mask], targets[mask].to(states.device), head)
                made = about(name, subject, example, f"layer {layer}", layer, "final norm and LM head on each layer")
                records.append({**made, "probability": float(logps.mean().exp())})
    return records


def final_norm(model: Any) -> Any:
    """The norm before the LM head.

    Raises:
        UserError: it stands under no name that is known.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for name in ("norm", "ln_f", "final_layer_norm", "final_layernorm"):
        if hasattr(base.base_model, name):
            return getattr(base.base_model, name)
    raise UserError(f"The final norm of {type(base).__name__} was not found.", where="attacks: logit_lens")
