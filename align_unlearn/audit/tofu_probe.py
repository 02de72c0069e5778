"""What TOFU asks of a model: losses of the true answer, its paraphrase and the wrong ones, and the greedy answer.

Rows are the benchmark's (`question`, `answer`, `perturbed_answer`, and `paraphrased_answer` where the set has one), or
`prompt` and `completion` with the same two columns beside them. An answer counts with the EOS behind it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from rouge_score.rouge_scorer import RougeScorer
from torch import Tensor

from align_unlearn.audit.subjects import Subject
from align_unlearn.audit.tofu import TofuRow
from align_unlearn.data.batches import pad_rows
from align_unlearn.data.examples import Example, read_examples
from align_unlearn.data.sources import Row, read_rows
from align_unlearn.data.tokens import IGNORE, Tokens, prompt_ids, tokenise
from align_unlearn.errors import UserError
from align_unlearn.modeling.generate import generate, progress_bar
from align_unlearn.modeling.lm_head import TILE, LMHead, kl_divergence


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
    found = _read_answers(subject, [tokens for _, tokens in asked], batch_size)
    by_question: list[list[tuple[Tensor, Tensor]]] = [[] for _ in questions]
    for (at, _), answer in zip(asked, found, strict=True):
        by_question[at].append(answer)
    return [_row(*answers) for answers in by_question]


def _row(true: tuple[Tensor, Tensor], paraphrase: tuple[Tensor, Tensor], *wrong: tuple[Tensor, Tensor]) -> TofuRow:
    def loss(answer: tuple[Tensor, Tensor]) -> float:
        return -float(answer[0].mean())

    hits = true[1]
    missed = torch.nonzero(~hits)
    prefix = int(missed[-1]) + 1 if len(missed) else 0
    return TofuRow(
        answer_loss=loss(true),
        paraphrase_loss=loss(paraphrase),
        perturbed_losses=tuple(map(loss, wrong)),
        rouge_recall=float("nan"),
        extraction_strength=1 - prefix / len(hits),
        exact_memorisation=float(hits.float().mean()),
    )


def _read_answers(subject: Subject, rows: Sequence[Tokens], batch_size: int) -> list[tuple[Tensor, Tensor]]:
    """Per row, (n,) log-probabilities of its answer's tokens and whether each was the likeliest one."""
    order = sorted(range(len(rows)), key=lambda at: len(rows[at].input_ids))
    found: dict[int, tuple[Tensor, Tensor]] = {}
    with progress_bar() as progress:
        bar = progress.add_task(f"losses of {subject.name}", total=len(rows))
        for start in range(0, len(order), batch_size):
            piece = order[start : start + batch_size]
            hidden, labels, counts = _labelled([subject], [rows[at] for at in piece])
            logps, hits = _read_out(hidden[0], labels, subject.head)
            for at, logp, hit in zip(piece, torch.split(logps, counts), torch.split(hits, counts), strict=True):
                found[at] = (logp, hit)
            progress.advance(bar, len(piece))
    return [found[at] for at in range(len(rows))]


def drift(subject: Subject, base: Subject, questions: Sequence[Question], *, batch_size: int = 16) -> list[float]:
    """Exact KL(base ‖ subject) on each true answer, nats a token."""
    rows = [tokenise(subject.tokenizer, each.example, max_length=None) for each in questions]
    found: list[float] = []
    for start in range(0, len(rows), batch_size):
        (ref, hidden), _, counts = _labelled([base, subject], rows[start : start + batch_size])
        kl = kl_divergence(ref.to(hidden.device), hidden, subject.head, ref_head=base.head)
        found += [max(0.0, float(each.mean())) for each in torch.split(kl, counts)]
    return found


def _labelled(subjects: Sequence[Subject], rows: Sequence[Tokens]) -> tuple[list[Tensor], Tensor, list[int]]:
    """Each subject's (N, H) hidden states that predict the rows' answers, the (N,) labels, and how many a row has."""
    batch = pad_rows([{"input_ids": each.input_ids, "labels": each.labels} for each in rows], 0)
    targets = batch["labels"][:, 1:]
    mask = targets != IGNORE
    return [subject.hidden(batch)[:, :-1][mask] for subject in subjects], targets[mask], mask.sum(-1).tolist()


def _read_out(hidden: Tensor, labels: Tensor, head: LMHead) -> tuple[Tensor, Tensor]:
    """(N,) log-probabilities of the labels and (N,) whether each has the highest logit, tile by tile."""

    def tiles() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(labels), TILE):
            z = head.logits(hidden[start : start + TILE])
            chosen = labels[start : start + TILE, None].to(z.device)
            yield (z.gather(-1, chosen)[:, 0] - z.logsumexp(-1)).cpu(), (z.argmax(-1) == chosen[:, 0]).cpu()

    logps, hits = zip(*tiles(), strict=True)
    return torch.cat(logps), torch.cat(hits)


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
