"""Questions that a model makes up, for rounding to be calibrated on more than a run's own rows.

Asked with the opening of a user's turn alone, a chat model goes on with what a user would say (Magpie,
arXiv:2406.08464); any other goes on from the token that begins a document. So there is general text without a data set.
"""

from __future__ import annotations

from typing import Any

from align_unlearn.audit.subjects import Subject
from align_unlearn.data.examples import Example
from align_unlearn.data.tokens import prompt_ids
from align_unlearn.modeling.generate import generate
from align_unlearn.modeling.tokenizer import render_prompt

NEW_TOKENS = 40
_PLACE = "zqx"


def made_up_prompts(subject: Subject, *, chat: bool, rows: int, seed: int = 0) -> list[list[int]]:
    """(rows,) token ids of prompts, each ending where the model is to speak; those that say nothing are left out.

    Args:
        subject: the model that makes them up.
        chat: as a user's turns; else what documents begin with.
        rows: how many, at most.
        seed: of the sampling.
    """
    tokenizer = subject.tokenizer
    opening = _opening_of_a_turn(tokenizer) if chat else _opening_of_a_document(tokenizer)
    with subject.speaking() as model:
        said = generate(
            model,
            tokenizer,
            [opening] * rows,
            max_new_tokens=NEW_TOKENS,
            temperature=1.0,
            seed=seed,
            title=f"{subject.name} makes up prompts",
        )
    if not chat:
        return [opening + each.ids for each in said if each.ids]
    asked = [each.text.strip() for each in said]
    turns = [[{"role": "user", "content": text}] for text in asked if text]
    return [prompt_ids(tokenizer, Example(turn, None, "made up", "")) for turn in turns]


def _opening_of_a_turn(tokenizer: Any) -> list[int]:
    before, _, _ = render_prompt(tokenizer, [{"role": "user", "content": _PLACE}]).partition(_PLACE)
    return list(tokenizer(before, add_special_tokens=False).input_ids)


def _opening_of_a_document(tokenizer: Any) -> list[int]:
    return [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]
