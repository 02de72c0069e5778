"""What TOFU asks of a model: losses of the true answer, its paraphrase and the wrong ones, and the greedy answer.

Rows are the benchmark's (`question`, `answer`, `perturbed_answer`, and `paraphrased_answer` where the set has one), or
`prompt` and `completion` with the same two columns beside them. An answer counts with the EOS behind it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rouge_score.rouge_scorer import RougeScorer

from align_unlearn.audit.memory_scores import exact_memorisation, extraction_strength
from align_unlearn.audit.reading import Reading, read_texts
from align_unlearn.audit.subjects import Subject
from align_unlearn.audit.tofu import TofuRow
from align_unlearn.data.examples import Example, read_examples
from align_unlearn.data.sources import Row, read_rows
from align_unlearn.data.tokens import prompt_ids, tokenise
from align_unlearn.errors import UserError
from align_unlearn.modeling.generate import generate


@dataclass(frozen=True)
class Question:
    """A question with its true answer (the example's completion), a paraphrase of that, and wrong answers."""

    example: Example
    paraphrase: str
    wrong: tuple[str, ...]

    @property
    def answers(self) -> tuple[str, ...]:
        """True answer, paraphrase, wrong answers."""
        return (str(self.example.completion), self.paraphrase, *self.wrong)


def read_questions(source: str) -> list[Question]:
    """The questions of a set.

    Raises:
        UserError: the set cannot be read, or a row has no answer or no wrong answers.
    """
    rows = read_rows(source)
    return [_question(row, example) for row, example in zip(rows, read_examples(source), strict=True)]


def _question(row: Row, example: Example) -> Question:
    wrong = row.columns.get("perturbed_answer")
    wrong = [wrong] if isinstance(wrong, str) else wrong
    if example.completion is None or not wrong:
        raise UserError(
            "The row needs an answer and wrong answers.",
            where=f"{row.where}, columns answer and perturbed_answer",
            fix="TOFU's sets whose names end in _perturbed have both",
        )
    return Question(example, row.columns.get("paraphrased_answer") or example.completion, tuple(wrong))


def losses(subject: Subject, questions: Sequence[Question], *, batch_size: int = 16) -> list[TofuRow]:
    """The teacher-forced half of a set's rows, one forward pass an answer; `rouge_recall` is left open (nan).

    Args:
        subject: who is asked.
        questions: of one set.
        batch_size: answers read at once; they are sorted by length.
    """
    tokenizer = subject.tokenizer
    asked = [
        (at, tokenise(tokenizer, question.example, answer, max_length=None))
        for at, question in enumerate(questions)
        for answer in question.answers
    ]
    found = read_texts({subject.name: subject}, [tokens for _, tokens in asked], batch_size)[subject.name]
    by_question: list[list[Reading]] = [[] for _ in questions]
    for (at, _), answer in zip(asked, found, strict=True):
        by_question[at].append(answer)
    return [_row(*answers) for answers in by_question]


def _row(true: Reading, paraphrase: Reading, *wrong: Reading) -> TofuRow:
    def loss(answer: Reading) -> float:
        return -float(answer.logps.mean())

    return TofuRow(
        answer_loss=loss(true),
        paraphrase_loss=loss(paraphrase),
        perturbed_losses=tuple(map(loss, wrong)),
        rouge_recall=float("nan"),
        extraction_strength=extraction_strength(true),
        exact_memorisation=exact_memorisation(true),
    )


def drift(subject: Subject, base: Subject, questions: Sequence[Question], *, batch_size: int = 16) -> list[float]:
    """Exact KL(base ‖ subject) on each true answer, nats a token."""
    rows = [tokenise(subject.tokenizer, each.example, max_length=None) for each in questions]
    read = read_texts({"base": base, "subject": subject}, rows, batch_size)["subject"]
    return [max(0.0, float(each.kl.mean())) for each in read]


def recalls(subject: Subject, questions: Sequence[Question], *, max_new_tokens: int) -> list[float]:
    """ROUGE-L recall of each greedy answer against the true one."""
    prompts = [prompt_ids(subject.tokenizer, question.example) for question in questions]
    with subject.speaking() as model:
        title = f"{subject.name} answers"
        said = generate(model, subject.tokenizer, prompts, max_new_tokens=max_new_tokens, title=title)
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return [
        float(scorer.score(question.answers[0], answer.text)["rougeL"].recall)
        for question, answer in zip(questions, said, strict=True)
    ]


def evaluate(
    subject: Subject, sets: Mapping[str, Sequence[Question]], *, max_new_tokens: int = 200
) -> dict[str, list[TofuRow]]:
    """The whole table of rows of every set, from which forget quality and model utility are made.

    Args:
        subject: who is asked.
        sets: `forget`, `retain`, `real_authors`, `world_facts`.
        max_new_tokens: of greedy answers; the benchmark has 200.
    """
    return {
        name: [
            replace(row, rouge_recall=recall)
            for row, recall in zip(
                losses(subject, questions), recalls(subject, questions, max_new_tokens=max_new_tokens), strict=True
            )
        ]
        for name, questions in sets.items()
    }
