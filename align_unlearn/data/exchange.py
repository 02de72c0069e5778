"""What a reward model reads and learns from: an exchange of a prompt and a response, judged or in pairs.

| columns                              | meaning                                  |
| ---                                  | ---                                      |
| `prompt`, `response`, `unsafe`       | one response and whether it is harmful   |
| `prompt`, `response`, `is_safe`      | the same, the other way round            |
| `prompt`, `chosen`, `rejected`       | two responses, the first the better one  |

`source` says where a row comes from; results are told apart by it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from align_unlearn.data.examples import Messages
from align_unlearn.data.sources import Row, read_rows
from align_unlearn.errors import UserError

_BOOLEANS = {"0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True}
LIMITS = (64, 192)
"""Tokens of the prompt (its end) and of the response (its beginning) that a reward model reads."""


@dataclass(frozen=True)
class Judged:
    """A response and what is known of it.

    Attributes:
        unsafe: whether it is harmful; none in a pair.
        rejected: the worse response of a pair, else none.
    """

    prompt: str
    response: str
    unsafe: bool | None
    source: str
    where: str
    rejected: str | None = None


def plain_prompt(prompt: str | Messages) -> str:
    """A prompt as text: the text, or what the messages say, line by line."""
    return prompt if isinstance(prompt, str) else "\n".join(turn["content"] for turn in prompt)


def exchange_windows(tokenizer: Any, prompt: str, response: str, limits: tuple[int, int] = LIMITS) -> list[list[int]]:
    """An exchange as the token ids that a scalar head is put on, a window of the response at a time.

    Each window ends with the same words. Of a long prompt the end is kept. What is said after the first window is
    judged too: a policy that opens harmlessly and then complies has not been harmless.
    """

    def ids(text: str) -> list[int]:
        return list(tokenizer(without_specials(tokenizer, text), add_special_tokens=False).input_ids)

    asked, said = ids(prompt.strip())[-limits[0] :], ids(response.strip())
    windows = [said[at : at + limits[1]] for at in range(0, max(1, len(said)), limits[1])]
    return [[*ids("Prompt: "), *asked, *ids("\nResponse: "), *window, *ids("\nVerdict:")] for window in windows]


def exchange_ids(tokenizer: Any, prompt: str, response: str, limits: tuple[int, int] = LIMITS) -> list[int]:
    """The first window of an exchange: what a reward model learns from."""
    return exchange_windows(tokenizer, prompt, response, limits)[0]


def without_specials(tokenizer: Any, text: str) -> str:
    """A text without the names of special tokens: said by a policy, they are no end of a turn."""
    for token in tokenizer.all_special_tokens:
        text = text.replace(token, " ")
    return text


def read_judged(source: str | Iterable[dict[str, Any]]) -> list[Judged]:
    """Judged responses or pairs, all of one kind.

    Raises:
        UserError: a row is neither, or both kinds are mixed.
    """
    rows = [_judged(row) for row in read_rows(source)]
    if len({row.rejected is None for row in rows}) > 1:
        raise UserError("Judged responses and pairs are mixed.", where=str(source), fix="one file of each kind")
    return rows


def at_most(rows: Sequence[Judged], limits: dict[str, int]) -> list[Judged]:
    """The rows, of each source that `limits` names at most so many: spread evenly, not the first ones.

    Raises:
        UserError: no row is of a source that is named.
    """
    kept = list(rows)
    for source, limit in limits.items():
        own = [row for row in kept if row.source == source]
        if not own:
            raise UserError(f"No row is of the source '{source}'.", where="source_limits",
                            fix=f"one of: {', '.join(sorted({row.source for row in rows}))}")  # fmt: skip
        chosen = {id(own[at * len(own) // limit]) for at in range(limit)} if limit < len(own) else set(map(id, own))
        kept = [row for row in kept if row.source != source or id(row) in chosen]
    return kept


def _judged(row: Row) -> Judged:
    columns = row.columns
    source = str(columns.get("source") or "all")
    prompt = _text(row, "prompt")
    if "chosen" in columns:
        return Judged(prompt, _text(row, "chosen"), None, source, row.where, rejected=_text(row, "rejected"))
    known = _BOOLEANS.get(str(columns.get("unsafe", columns.get("is_safe"))).lower())
    if known is None:
        raise UserError(
            "A judged response needs `unsafe` (or `is_safe`): 0 or 1.",
            where=row.where,
            fix="or rows of prompt, chosen, rejected",
        )
    unsafe = known if "unsafe" in columns else not known
    return Judged(prompt, _text(row, "response"), unsafe, source, row.where)


def _text(row: Row, column: str) -> str:
    value = row.columns.get(column)
    if isinstance(value, list) and value and all(isinstance(turn, dict) and "content" in turn for turn in value):
        value = plain_prompt(value)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"The column '{column}' holds no text.", where=f"{row.where}, column {column}")
    return value
