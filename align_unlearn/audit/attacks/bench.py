"""What attacks work with: rows, their texts, copies to be changed, and the measurement after each change.

The models that are examined are never changed: an attack works on a plain copy in memory, and nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from align_unlearn.audit.answers import Record, verdict_on
from align_unlearn.audit.memory_scores import probability
from align_unlearn.audit.reading import read_texts
from align_unlearn.audit.subjects import Subject
from align_unlearn.data.examples import Example
from align_unlearn.data.tokens import Tokens, prompt_ids
from align_unlearn.modeling.generate import generate


@dataclass(frozen=True)
class Bench:
    """The material of an attack.

    Attributes:
        forget: rows to be forgotten, each with its text as tokens: its own, or what the base answered.
        kept: rows to be kept, likewise.
        benign: prompts that are no request for what was forgotten.
        base: the model as it was before.
        max_new_tokens: of each answer.
        seed: of everything drawn.
    """

    forget: Sequence[tuple[Example, Tokens]]
    kept: Sequence[tuple[Example, Tokens]]
    benign: Sequence[Example]
    base: Subject
    max_new_tokens: int
    seed: int = 0

    @property
    def halves(self) -> tuple[list[tuple[Example, Tokens]], list[tuple[Example, Tokens]]]:
        """Rows that an opponent has, and other rows of the same kind on which the attack is measured."""
        return list(self.forget[::2]), list(self.forget[1::2])

    def measure(
        self,
        attack: str,
        subject: Subject,
        setting: str,
        at: float,
        budget: str,
        rows: Sequence[tuple[Example, Tokens]] | None = None,
        *,
        given: bool = False,
    ) -> list[Record]:
        """What a changed subject says to the rows, and how likely their texts are to it.

        Args:
            attack: its name.
            subject: as it was changed.
            setting: of the attack, in words.
            at: the same as a number.
            budget: what it took.
            rows: those asked; all to be forgotten where none are named.
            given: the opponent had beforehand what is measured, so that it coming back recovers nothing.
        """
        asked = self.forget if rows is None else rows
        read = read_texts({"changed": subject}, [tokens for _, tokens in asked])["changed"]
        prompts = [prompt_ids(subject.tokenizer, example) for example, _ in asked]
        title = f"{subject.name} after {attack}, {setting}"
        with subject.speaking() as model:
            said = generate(model, subject.tokenizer, prompts, max_new_tokens=self.max_new_tokens, title=title)
        records = []
        for (example, _), reading, answer in zip(asked, read, said, strict=True):
            verdict = verdict_on("forget", example, answer.text)
            records.append(
                {
                    **about(attack, subject, example, setting, at, budget),
                    "prompt": example.question,
                    "completion": answer.text,
                    "tokens": len(answer.ids),
                    "verdict": verdict,
                    "leak": verdict == "leak",
                    "given": given,
                    "probability": probability(reading),
                }
            )
        return records


Attack = Callable[..., list[Record]]
"""(name, subject, bench, **options) → records. Options come from the suite; the budget is said in each record."""


def about(attack: str, subject: Subject, example: Example, setting: str, at: float, budget: str) -> Record:
    """What every attack's record says. `at` is the setting as a number, along which a curve is drawn."""
    return {
        "probe": "attack",
        "attack": attack,
        "group": "forget",
        "model": subject.name,
        "id": example.id,
        "setting": setting,
        "at": at,
        "budget": budget,
    }


def copied(subject: Subject, dtype: torch.dtype | None = None) -> Subject:
    """The subject on a plain copy of its weights, which may be changed; in its own dtype where none is given."""
    dtype = dtype or subject.model.get_input_embeddings().weight.dtype
    return replace(subject, model=subject.plain(dtype), adapters_off=False, beneath=None)


def with_model(subject: Subject, model: Any) -> Subject:
    """The subject with another model in its place."""
    return replace(subject, model=model)
