"""Questions that a model makes up, for rounding to be calibrated on more than a run's own rows.

Asked with the opening of a user's turn alone, a chat model goes on with what a user would say (Magpie,
arXiv:2406.08464); any other goes on from the token that documents begin with. So there is general text without data.
"""

from __future__ import annotations

from typing import Any

from align_unlearn.data.examples import Example
from align_unlearn.data.tokens import prompt_ids
from align_unlearn.modeling.generate import generate
from align_unlearn.modeling.tokenizer import PROBE, render_prompt

NEW_TOKENS = 40


def made_up_prompts(
    model: Any, tokenizer: Any, *, chat: bool, rows: int, at_once: int = 64, seed: int = 0
) -> list[list[int]]:
    """(rows,) token ids of prompts, each ending where the model is to speak; those that say nothing are left out.

    Args:
        model: that makes them up.
        tokenizer: its own.
        chat: as a user's turns; else what documents begin with.
        rows: how many, at most.
        at_once: how many in a batch.
        seed: of the sampling.
    """
    before, after = _around_a_question(tokenizer) if chat else ([], "")
    opening = before or _opening_of_a_document(tokenizer)
    said = generate(
        model,
        tokenizer,
        [opening] * rows,
        max_new_tokens=NEW_TOKENS,
        temperature=1.0,
        seed=seed,
        batch_size=at_once,
        title="the original makes up prompts",
    )
    if not chat:
        return [opening + each.ids for each in said if each.ids]
    asked = [(each.text.partition(after)[0] if after else each.text).strip() for each in said]
    turns = [[{"role": "user", "content": text}] for text in asked if text]
    return [prompt_ids(tokenizer, Example(turn, None, "made up", "")) for turn in turns]


def _around_a_question(tokenizer: Any) -> tuple[list[int], str]:
    """What a template writes before a user's words, as ids, and after them; nothing where it changes the words."""
    before, found, after = render_prompt(tokenizer, [{"role": "user", "content": PROBE}]).partition(PROBE)
    return (list(tokenizer(before, add_special_tokens=False).input_ids), after.strip()) if found else ([], "")


def _opening_of_a_document(tokenizer: Any) -> list[int]:
    """The token that texts begin with: the tokenizer's own, else a special one that is in no turn of a chat."""
    first = tokenizer("a").input_ids[0]
    if first in tokenizer.all_special_ids:
        return [first]
    turn = render_prompt(tokenizer, [{"role": "user", "content": "a"}]) if tokenizer.chat_template else ""
    of_turns = set(tokenizer(turn, add_special_tokens=False).input_ids)
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    return [next((each for each in special if each is not None and each not in of_turns), tokenizer.eos_token_id)]
