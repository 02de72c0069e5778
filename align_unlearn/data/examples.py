"""Rows of any accepted format as one kind of thing: an `Example` with a prompt and, where it has one, a completion.

| columns                          | prompt                    | completion                 |
| ---                              | ---                       | ---                        |
| `prompt`, `completion`           | text or messages          | text or one message        |
| `prompt`, `chosen`, `rejected`   | text or messages          | `rejected` (to be forgotten) |
| `messages`                       | all but the last          | the last                   |
| `question`, `answer`             | one user message          | the answer                 |
| `prompt` or `question` alone     | as above                  | none; the original answers |
| `text`                           | the first tokens          | the tokens that follow     |

As in TRL, a prompt that is a string is plain text; a prompt that is a list of messages is rendered with the model's
chat template.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from align_unlearn.data.sources import CORPUS, Row, read_rows, read_text
from align_unlearn.errors import UserError

Messages = list[dict[str, str]]
FORMATS = "prompt/completion, prompt/chosen/rejected, messages, question/answer, or text"


_OWN = frozenset({"id", "prompt", "question", "messages"})


@dataclass(frozen=True)
class Example:
    """One prompt and what is said to it.

    Attributes:
        prompt: plain text, or messages for the chat template.
        completion: what is to be forgotten or kept; none where the original's own answer is meant.
        where: the file and row it comes from.
        id: the row's `id`, else its place.
        chosen: the preferred answer of a preference row.
        paraphrases: the same question in other words, where the row has some.
        translations: the same question in other languages, (language, text).
        ends: whether the completion ends by itself, so that an EOS belongs behind it.
        columns: the row's other columns, which rewards are given by name.
    """

    prompt: str | Messages
    completion: str | None
    where: str
    id: str
    chosen: str | None = None
    paraphrases: tuple[str, ...] = ()
    translations: tuple[tuple[str, str], ...] = ()
    ends: bool = True
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def question(self) -> str:
        """The prompt as a person reads it: the text, or the last message."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[-1]["content"]


def read_examples(
    source: str | Iterable[dict[str, Any]],
    tokenizer: Any = None,
    *,
    prefix_tokens: int = 30,
    continuation_tokens: int = 60,
) -> list[Example]:
    """The examples of a source.

    Args:
        source: as `read_rows` takes it.
        tokenizer: cuts plain passages; only rows with `text` need it.
        prefix_tokens: length of a passage's prompt.
        continuation_tokens: length of a passage's completion.

    Raises:
        UserError: the source cannot be read, or a row fits no format (with file, row and columns).
    """
    examples: list[Example] = []
    seen: set[str] = set()
    for row in read_rows(source):
        if "text" in row.columns and not {"prompt", "question", "messages"} & row.columns.keys():
            if tokenizer is None:
                raise UserError("Plain passages need a tokenizer to be cut.", where=row.where)
            text = _string(row, "text")
            examples += _passages(text, row, tokenizer, prefix_tokens, continuation_tokens)
        else:
            example = replace(_example(row), columns=_others(row))
            if example.id in seen:
                example = replace(example, id=f"{example.id} ({row.where})")
            seen.add(example.id)
            examples.append(example)
    if not examples:
        raise UserError(
            f"No passage is longer than {prefix_tokens} tokens.", where=str(source), fix="a smaller --prefix_tokens"
        )
    return examples


def as_requests(examples: Iterable[Example]) -> list[Example]:
    """Rows as requests that must not be complied with in whatever words: without answers, which are examples of it."""
    return [replace(example, completion=None) for example in examples]


def read_refusals(source: str) -> list[str]:
    """Refusals: one a line in a text file, else rows with a column `refusal` (or `text`)."""
    builtin = CORPUS / f"{source.removeprefix('builtin:')}.txt"
    place = builtin if source.startswith("builtin:") and builtin.is_file() else Path(source)
    if place.suffix == ".txt":
        if not place.is_file():
            raise UserError("There is no such file of refusals.", where=source)
        refusals = [line.strip() for line in read_text(place).split("\n") if line.strip()]
    else:
        refusals = [_string(row, "refusal" if "refusal" in row.columns else "text") for row in read_rows(source)]
    if not refusals:
        raise UserError("There are no refusals.", where=source)
    return refusals


def _example(row: Row) -> Example:
    columns = row.columns
    name = str(columns["id"]) if columns.get("id") not in (None, "") else row.where
    ends = _ends(row)
    beside: dict[str, Any] = {"paraphrases": _paraphrases(row), "translations": _translations(row), "ends": ends}
    if "messages" in columns:
        messages = _messages(row, "messages")
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise UserError("The last of `messages` must be the assistant's.", where=f"{row.where}, column messages")
        return Example(messages[:-1], messages[-1]["content"], row.where, name, ends=ends)
    if "question" in columns:
        prompt: str | Messages = [{"role": "user", "content": _string(row, "question")}]
        answer = _string(row, "answer") if columns.get("answer") is not None else None
        return Example(prompt, answer, row.where, name, **beside)
    if "prompt" in columns:
        prompt = _string(row, "prompt") if isinstance(columns["prompt"], str) else _messages(row, "prompt")
        if "rejected" in columns:
            return Example(prompt, _turn(row, "rejected"), row.where, name, chosen=_turn(row, "chosen"), ends=ends)
        completion = _turn(row, "completion") if columns.get("completion") is not None else None
        return Example(prompt, completion, row.where, name, **beside)
    raise UserError(
        f"The row's columns ({', '.join(columns) or 'none'}) fit no format.", where=row.where, fix=f"use {FORMATS}"
    )


def _others(row: Row) -> dict[str, Any]:
    """What a row says beside its prompt and id; an answer too, which a reward may compare with."""
    return {name: value for name, value in row.columns.items() if name not in _OWN}


def _paraphrases(row: Row) -> tuple[str, ...]:
    found: list[str] = []
    for column in ("paraphrase", "paraphrases", "paraphrased_question"):
        given = row.columns.get(column) or []
        texts = [given] if isinstance(given, str) else given
        if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
            raise UserError(f"The column '{column}' is a text, or a list of texts.", where=row.where)
        found += texts
    return tuple(dict.fromkeys(found))


def _translations(row: Row) -> tuple[tuple[str, str], ...]:
    given = row.columns.get("translations") or {}
    if not isinstance(given, Mapping) or not all(isinstance(text, str) for text in given.values() if text is not None):
        raise UserError("The column 'translations' maps languages to texts.", where=row.where)
    return tuple((str(language), text) for language, text in given.items() if text)


def _ends(row: Row) -> bool:
    """Whether the completion is all of what is said, as the column `ends` has it; where there is none, it is."""
    given = row.columns.get("ends")
    if given is not None and not isinstance(given, bool):
        raise UserError("The column 'ends' is true or false.", where=f"{row.where}, column ends")
    return given is not False


def _string(row: Row, column: str) -> str:
    value = row.columns.get(column)
    if not isinstance(value, str) or not value.strip():
        kind = "empty" if value in (None, "") or isinstance(value, str) else f"{type(value).__name__}, not text"
        raise UserError(f"The column '{column}' is {kind}.", where=f"{row.where}, column {column}")
    _check_unicode(value, row, column)
    return value


def _check_unicode(text: str, row: Row, column: str) -> None:
    """JSON may hold half a character, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"The column '{column}' is no Unicode: character {error.start + 1} is half of one.",
            where=f"{row.where}, column {column}",
        ) from error


def _messages(row: Row, column: str) -> Messages:
    value = row.columns[column]
    fits = isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value)
    if not fits or not all(isinstance(turn.get(key), str) for turn in value for key in ("role", "content")):
        raise UserError(
            f"The column '{column}' must be a list of messages, each with role and content.",
            where=f"{row.where}, column {column}",
        )
    for turn in value:
        _check_unicode(turn["content"], row, column)
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]


def _turn(row: Row, column: str) -> str:
    """An answer: plain text, or a list of one assistant message."""
    return _messages(row, column)[-1]["content"] if isinstance(row.columns.get(column), list) else _string(row, column)


def _passages(text: str, row: Row, tokenizer: Any, prefix: int, continuation: int) -> Iterator[Example]:
    """Consecutive windows of a text, cut where a word begins so that tokens do not merge across the cut."""
    offsets = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
    starts = [at for at, (begin, end) in enumerate(offsets) if end > begin and _word_begins(text, begin)]
    at = 0
    while at < len(offsets):
        cut = next((start for start in starts if start >= at + prefix), None)
        if cut is None or len(offsets) - cut < min(8, continuation):
            return
        end = next((start for start in starts if start >= cut + continuation), len(offsets))
        first, middle = _outer(text, offsets[at][0]), _outer(text, offsets[cut][0])
        last = len(text) if end == len(offsets) else _outer(text, offsets[end][0])
        number = f"tokens {at} to {end}"
        name = f"{row.columns.get('id', row.where)}, {number}"
        yield Example(text[first:middle].lstrip(), text[middle:last], f"{row.where}, {number}", name, ends=False)
        at = end


def _word_begins(text: str, begin: int) -> bool:
    return begin == 0 or text[begin].isspace() or text[begin - 1].isspace()


def _outer(text: str, begin: int) -> int:
    """Byte-level tokenizers hold a word's leading space in the word but may leave it out of the offsets."""
    return begin - 1 if begin > 0 and text[begin - 1] == " " and not text[begin].isspace() else begin
