"""Sounding like the original, and not in circles: against rewards that gibberish satisfies.

rewards:
  fluent: {model: fluency, weight: 0.3}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from align_unlearn.config import BaseModelConfig
from align_unlearn.data.batches import pad_rows
from align_unlearn.data.examples import Example, Messages
from align_unlearn.data.exchange import without_specials
from align_unlearn.data.tokens import IGNORE, Tokens, completion_ids, prompt_ids
from align_unlearn.errors import UserError
from align_unlearn.modeling.forward import hidden_states
from align_unlearn.modeling.lm_head import LMHead, token_logps
from align_unlearn.modeling.load import load_base
from align_unlearn.modeling.roles import evaluating, original
from align_unlearn.modeling.tokenizer import load_tokenizer


class Fluency:
    """Mean log-probability a token under the original, nats, at most `good`, less a penalty for repetition.

    Args:
        path: a causal LM; the policy's own original where none is named.
        good: above this nothing is gained (an original finds its own favourite phrases most likely).
        floor: below this nothing is lost.
        repetition: what a completion loses that says nothing but one three-word phrase.
        load_in_4bit: hold that model's weights in 4 bits.
        batch_size: rows at once.
    """

    def __init__(
        self,
        path: str | None = None,
        good: float = -1.5,
        floor: float = -8.0,
        repetition: float = 2.0,
        load_in_4bit: bool = False,
        batch_size: int = 16,
    ) -> None:
        self.path, self.good, self.floor, self.repetition, self.batch_size = path, good, floor, repetition, batch_size
        self.model: Any = None
        if path is not None:
            config = BaseModelConfig(model_name_or_path=path, load_in_4bit=load_in_4bit)
            self.model, self.tokenizer = load_base(config), load_tokenizer(path)

    def attach(self, model: Any, tokenizer: Any) -> None:
        """Asks the policy's original where no model of its own was named."""
        if self.path is None:
            self.model, self.tokenizer = model, tokenizer

    @torch.no_grad()
    def score(
        self,
        prompts: list[Messages],
        completions: list[str],
        plain: Sequence[bool] | None = None,
        **columns: Any,
    ) -> list[float]:
        """Nats a token; an empty completion gets the floor. `plain` says which prompts are text to be continued."""
        if self.model is None:
            raise UserError("Fluency has no model to ask.", where="reward fluency", fix="kwargs: {path: a causal LM}")
        texts = plain or [False] * len(prompts)
        asked = [each[-1]["content"] if text else each for each, text in zip(prompts, texts, strict=True)]
        found: list[float] = []
        for start in range(0, len(prompts), self.batch_size):
            rows = slice(start, start + self.batch_size)
            likely = self._likelihood(asked[rows], completions[rows])
            found += [
                max(self.floor, min(self.good, value)) - self.repetition * repeated(text)
                for value, text in zip(likely, completions[rows], strict=True)
            ]
        return found

    def _likelihood(self, prompts: Sequence[str | Messages], completions: Sequence[str]) -> list[float]:
        rows = []
        for prompt, completion in zip(prompts, completions, strict=True):
            text = without_specials(self.tokenizer, completion)
            example = Example(prompt, text, "a completion", "", ends=False)
            rows.append(Tokens(prompt_ids(self.tokenizer, example), completion_ids(self.tokenizer, example, text)))
        batch = pad_rows(
            [{"input_ids": row.input_ids, "labels": row.labels} for row in rows], self.tokenizer.pad_token_id
        )
        ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"][:, 1:]
        off = original if hasattr(self.model, "disable_adapter") else evaluating
        with off(self.model):
            device = self.model.device
            hidden = hidden_states(self.model, ids.to(device), mask.to(device))[:, :-1]
            said = (labels != IGNORE).to(device)
            logps = torch.zeros(labels.shape, device=device)
            if said.any():
                head = LMHead.of(self.model)
                logps[said] = token_logps(hidden[said], labels.to(device)[said], head).to(logps.dtype)
        counts = said.sum(-1)
        return [
            float(total / count) if count else self.floor
            for total, count in zip(logps.sum(-1), counts.tolist(), strict=True)
        ]


def repeated(text: str) -> float:
    """Share of three-word phrases that were said before, between 0 and 1."""
    said = text.lower().split()
    phrases = [tuple(said[at : at + 3]) for at in range(len(said) - 2)]
    return 1 - len(set(phrases)) / len(phrases) if phrases else 0.0
