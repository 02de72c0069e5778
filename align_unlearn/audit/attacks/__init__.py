"""Attacks: ways of changing the model, or of looking into it, to bring the forgotten back.

A new one is a file with a function (name, subject, bench, **options) → records, and a line in this table.
"""

from functools import partial

from align_unlearn.audit.attacks import (
    linear_probe,
    logit_lens,
    prune,
    refusal_direction,
    requantise,
    scale,
    soft_prompt,
    tuning,
)
from align_unlearn.audit.attacks.bench import Attack, Bench

ATTACKS: dict[str, Attack] = {
    "requantise": requantise.attack,
    "prune": prune.attack,
    "scale": scale.attack,
    "relearn": partial(tuning.relearn, share="half"),
    "relearn_forget": tuning.relearn,
    "relearn_full": partial(tuning.relearn, share="half", weights="full"),
    "benign_tuning": tuning.benign,
    "soft_prompt": soft_prompt.attack,
    "refusal_direction": refusal_direction.attack,
    "logit_lens": logit_lens.attack,
    "linear_probe": linear_probe.attack,
}

__all__ = ["ATTACKS", "Attack", "Bench"]
