"""Questions with choices, by log-probability: what MMLU, WMDP and TruthfulQA ask.

Rows are the benchmarks' own: `question`, `choices`, `answer` (an index), with an optional `subject`; or TruthfulQA's
`question` and `mc1_targets`. The prompt is the field's: the question, lettered choices, `Answer:`, and the letter whose
log-probability is the highest. TruthfulQA's choices are whole answers, compared by their summed log-probability.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align_unlearn.audit.answers import Record, say
from align_unlearn.audit.benchmarks.benchmark import MODELS, Limits, mean_metric, spread
from align_unlearn.audit.kept import kept_rows
from align_unlearn.audit.reading import read_batch
from align_unlearn.audit.subjects import Subject
from align_unlearn.data.sources import Row, read_rows
from align_unlearn.data.tokens import Tokens
from align_unlearn.errors import UserError
from align_unlearn.judge import holds

LETTERS = "ABCDEFGHIJ"
HAZARDS = ("wmdp",)
"""Sets whose names begin so ask for what a model had better not know."""


@dataclass(frozen=True)
class Question:
    """A question with its choices.

    Attributes:
        lettered: the choices are listed and a letter is asked for; else each choice is an answer by itself.
    """

    id: str
    question: str
    choices: tuple[str, ...]
    answer: int
    subject: str | None = None
    lettered: bool = True

    @property
    def prompt(self) -> str:
        """The field's prompt."""
        if not self.lettered:
            return f"Q: {self.question}\nA:"
        about = f" about {self.subject.replace('_', ' ')}" if self.subject else ""
        listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=False))
        return (
            f"The following are multiple choice questions (with answers){about}.\n\n"
            f"{self.question.strip()}\n{listed}\nAnswer:"
        )

    @property
    def continuations(self) -> tuple[str, ...]:
        """What is scored behind the prompt, a text for each choice."""
        return tuple(f" {letter}" for letter in LETTERS[: len(self.choices)]) if self.lettered else tuple(
            f" {choice}" for choice in self.choices)  # fmt: skip


def read_choices(source: str, limit: int | None = None) -> list[Question]:
    """The questions of a source; of a longer one, `limit` rows spread evenly.

    Raises:
        UserError: it cannot be read, or a row is not such a question.
    """
    return [_question(row) for row in spread(read_rows(source), limit)]


def _question(row: Row) -> Question:
    columns = row.columns
    name, subject = str(columns.get("id") or row.where), columns.get("subject")
    try:
        if "mc1_targets" in columns:
            targets = columns["mc1_targets"]
            if "choices" in targets:  # as the hub has them
                targets = dict(zip(targets["choices"], targets["labels"], strict=True))
            choices = tuple(map(str, targets))
            return Question(name, str(columns["question"]), choices, list(targets.values()).index(1), lettered=False)
        choices, answer = tuple(map(str, columns["choices"])), int(columns["answer"])
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"The row is no question with choices: {error!r}.",
            where=row.where,
            fix="columns question, choices and answer (an index), or question and mc1_targets",
        ) from error
    if not 0 <= answer < len(choices) <= len(LETTERS) or len(choices) < 2:
        raise UserError(f"The answer {answer} is none of {len(choices)} choices.", where=row.where)
    return Question(name, str(columns["question"]), choices, answer, subject)


def ask_choices(subjects: Mapping[str, Subject], name: str, questions: Sequence[Question]) -> list[Record]:
    """A record for each question and subject: whether the right choice is the likeliest."""
    records = []
    for who, subject in subjects.items():
        rows = [_tokens(subject, each.prompt, text) for each in questions for text in each.continuations]

        def make(batch: list[int], who: str = who, subject: Subject = subject, rows: Any = rows) -> list[float]:
            return [float(each.logps.sum()) for each in read_batch({who: subject}, [rows[at] for at in batch])[who]]

        given = [[each.prompt_ids, each.completion_ids] for each in rows]
        title = f"{who}: {name}"
        scores = iter(
            kept_rows("sums", subject.sha256, given, make, size=lambda row: len(row[0]), batch_size=8, title=title)
        )
        for each in questions:
            own = [next(scores) for _ in each.choices]
            correct = all(own[each.answer] > other for at, other in enumerate(own) if at != each.answer)
            records.append(
                {"probe": "multiple_choice", "group": "utility", "set": name, "model": who, "id": each.id,
                 "correct": correct, "chance": 1 / len(each.choices)}
            )  # fmt: skip
    return records


def ask_open(
    subjects: Mapping[str, Subject], name: str, questions: Sequence[Question], *, max_new_tokens: int
) -> list[Record]:
    """The stricter reading: the question without its choices, and whether the answer holds the right one."""
    records = []
    for who, subject in subjects.items():
        prompts = [list(subject.tokenizer(f"Question: {each.question}\nAnswer:").input_ids) for each in questions]
        said = say(subject, prompts, max_new_tokens=max_new_tokens, title=f"{who}: {name}, open")
        for each, answers in zip(questions, said, strict=True):
            text = answers[0]["text"]
            records.append(
                {"probe": "open_answers", "group": "utility", "set": name, "model": who, "id": each.id,
                 "correct": holds(text, each.choices[each.answer], each.question)}
            )  # fmt: skip
    return records


def ask(subjects: Mapping[str, Subject], sources: Mapping[str, Any], limits: Limits) -> list[Record]:
    """Every set of `{name: source}` by log-probability."""
    return [
        record
        for name, source in sources.items()
        for record in ask_choices(subjects, name, read_choices(str(source), limits.rows))
    ]


def ask_openly(subjects: Mapping[str, Subject], sources: Mapping[str, Any], limits: Limits) -> list[Record]:
    """Every set of `{name: source}` without its choices."""
    return [
        record
        for name, source in sources.items()
        for record in ask_open(
            subjects, name, read_choices(str(source), limits.rows), max_new_tokens=limits.max_new_tokens
        )
    ]


def metrics(records: Sequence[Record]) -> list[dict[str, Any]]:
    """`utility.SET`: the share of right choices, beside what guessing gives."""
    return _shares(records, "multiple_choice", "", "by log-probability")


def open_metrics(records: Sequence[Record]) -> list[dict[str, Any]]:
    """`utility.SET.open`: the share of open answers that hold the right choice."""
    return _shares(records, "open_answers", ".open", "open answers, greedy")


def _shares(records: Sequence[Record], probe: str, ending: str, budget: str) -> list[dict[str, Any]]:
    found = []
    for name in dict.fromkeys(each["set"] for each in records if each["probe"] == probe):
        own = [each for each in records if each["probe"] == probe and each["set"] == name]
        values = {model: [float(each["correct"]) for each in own if each["model"] == model] for model in MODELS}
        chances = [each["chance"] for each in own if "chance" in each]
        guessing = f"; guessing gives {sum(chances) / len(chances):.2f}" if chances else ""
        better = "lower" if name.startswith(HAZARDS) else "higher"
        found.append(mean_metric(f"utility.{name}{ending}", "utility", better, values, budget + guessing, share=True))
    return found


def _tokens(subject: Subject, prompt: str, continuation: str) -> Tokens:
    whole = list(subject.tokenizer(prompt + continuation).input_ids)
    start = list(subject.tokenizer(prompt).input_ids)
    if whole[: len(start)] == start:
        return Tokens(start, whole[len(start) :])
    return Tokens(start, list(subject.tokenizer(continuation, add_special_tokens=False).input_ids))
