"""Examples → token ids and labels. A row is never truncated: one that does not fit is an error that names it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from align_unlearn.data.examples import Example
from align_unlearn.errors import UserError
from align_unlearn.modeling.tokenizer import render_completion, render_prompt

IGNORE = -100


@dataclass(frozen=True)
class Tokens:
    """A prompt and a completion as token ids. Only the completion is trained on."""

    prompt_ids: list[int]
    completion_ids: list[int]

    @property
    def input_ids(self) -> list[int]:
        """Prompt and completion."""
        return self.prompt_ids + self.completion_ids

    @property
    def labels(self) -> list[int]:
        """-100 on the prompt, the ids on the completion."""
        return [IGNORE] * len(self.prompt_ids) + self.completion_ids


def prompt_ids(tokenizer: Any, example: Example) -> list[int]:
    """The ids after which the model speaks: exactly what it is asked with at inference."""
    if isinstance(example.prompt, str):
        return list(tokenizer(example.prompt).input_ids)
    text = render_prompt(tokenizer, example.prompt, where=example.where)
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def completion_ids(tokenizer: Any, example: Example, completion: str) -> list[int]:
    """The ids of a completion, with one EOS behind it if it ends by itself.

    What chat templates write after the EOS (a newline, mostly) is left out: no model says it.
    """
    if isinstance(example.prompt, str):
        ids = list(tokenizer(completion, add_special_tokens=False).input_ids)
        return [*ids, tokenizer.eos_token_id] if example.ends else ids
    text = render_completion(tokenizer, example.prompt, completion) if example.ends else completion
    ids = list(tokenizer(text, add_special_tokens=False).input_ids)
    if not example.ends:
        return ids
    last = max((at for at, token in enumerate(ids) if token == tokenizer.eos_token_id), default=len(ids))
    return [*ids[:last], tokenizer.eos_token_id]


def tokenise(tokenizer: Any, example: Example, completion: str | None = None, *, max_length: int | None) -> Tokens:
    """One example as tokens.

    Args:
        completion: in place of the example's own.
        max_length: the longest row allowed, prompt and completion together.

    Raises:
        UserError: the row has no completion, or is longer than `max_length`.
    """
    text = completion if completion is not None else example.completion
    if text is None:
        raise UserError("The row has no completion.", where=example.where, fix="add a column completion or answer")
    tokens = Tokens(prompt_ids(tokenizer, example), completion_ids(tokenizer, example, text))
    if not tokens.completion_ids:
        raise UserError("The completion has no tokens.", where=example.where)
    check_length(tokens, max_length, example.where)
    return tokens


def check_length(tokens: Tokens, max_length: int | None, where: str) -> None:
    """Refuses a row that is longer than `max_length` tokens.

    Raises:
        UserError: it is.
    """
    length = len(tokens.prompt_ids) + len(tokens.completion_ids)
    if max_length is not None and length > max_length:
        raise UserError(
            f"The row has {length} tokens ({len(tokens.prompt_ids)} of prompt), more than max_length {max_length}.",
            where=where,
            fix=f"--max_length {length}, or shorten the row; rows are never cut silently",
        )


def token_columns(
    tokenizer: Any, examples: Sequence[Example], *, max_length: int | None, chosen: bool = False
) -> dict[str, list[Any]]:
    """Columns `input_ids` and `labels` for TRL's trainers and our collator.

    Args:
        chosen: add a column `chosen` with the same of each row's chosen answer.

    Raises:
        UserError: a row has no completion or, if asked for, no chosen answer; or it is longer than `max_length`.
    """
    columns = _columns([tokenise(tokenizer, example, max_length=max_length) for example in examples])
    if not chosen:
        return columns
    wanted = []
    for example in examples:
        if example.chosen is None:
            raise UserError("The row needs a chosen answer.", where=example.where, fix="add a column chosen")
        answer = replace(example, completion=example.chosen, ends=True)
        wanted.append(tokenise(tokenizer, answer, max_length=max_length))
    beside = _columns(wanted)
    return columns | {"chosen": [dict(zip(beside, row, strict=True)) for row in zip(*beside.values(), strict=True)]}


def _columns(rows: Sequence[Tokens]) -> dict[str, list[Any]]:
    return {"input_ids": [row.input_ids for row in rows], "labels": [row.labels for row in rows]}
