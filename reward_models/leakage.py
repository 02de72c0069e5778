"""How much of a protected corpus a completion gives away: verbatim runs, n-grams, ROUGE-L.

    rewards:
      book: {model: leakage, kwargs: {corpus: book.txt}}

The corpus is indexed once, as a suffix array over its words, so that the longest run that begins at each word of a
completion is a binary search: a million words cost milliseconds a completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rouge_score.rouge_scorer import RougeScorer

from align_unlearn.data.examples import Messages
from align_unlearn.data.sources import read_rows
from align_unlearn.data.words import words
from align_unlearn.errors import UserError

CHANCE = 4
"""Fewer words in a row than this are no overlap: every text says "at the same"."""
DEEPEST = 256
"""Words up to which suffixes are told apart; longer runs are found all the same, by walking on."""


class Leakage:
    """Minus a leak between 0 and 1: the mean of three measures, or one of them.

    - `run`: words of the longest verbatim run over `run_words`, at most 1;
    - `ngram`: share of the completion's n-grams that stand in the corpus;
    - `rouge`: ROUGE-L F1 with the passage around the longest run, or with the row's own `reference`.

    Args:
        corpus: a text file, or any source of rows with `text`, `answer` or `completion`.
        measure: `mean`, `run`, `ngram` or `rouge`.
        run_words: a verbatim run of so many words is as bad as it gets.
        n: of the n-grams.

    Raises:
        UserError: the corpus cannot be read, or holds no words; an unknown measure.
    """

    def __init__(self, corpus: str, measure: str = "mean", run_words: int = 16, n: int = 4) -> None:
        if measure not in ("mean", "run", "ngram", "rouge"):
            raise UserError(
                f"There is no measure '{measure}'.", where="reward leakage", fix="mean, run, ngram or rouge"
            )
        if run_words < CHANCE or n < 1:
            raise UserError(f"run_words is at least {CHANCE} and n at least 1.", where="reward leakage")
        self.index = CorpusIndex(_texts(corpus))
        self.measure, self.run_words, self.n = measure, run_words, n
        self.scorer = RougeScorer(["rougeL"], tokenizer=_Words())

    def score(
        self,
        prompts: list[Messages],
        completions: list[str],
        reference: Sequence[str | None] | None = None,
        **columns: Any,
    ) -> list[float]:
        """0 where nothing leaks, −1 at worst."""
        given = reference or [None] * len(prompts)
        return [-self.leak(text, own) for text, own in zip(completions, given, strict=True)]

    def leak(self, completion: str, reference: str | None = None) -> float:
        """The measure of one completion, between 0 and 1."""
        said = words(completion)
        if not said:
            return 0.0
        counted = self.measure in ("run", "ngram")  # ROUGE wants the passage of the longest run, however long
        lengths, places = self.index.matches(said, enough=max(self.run_words, self.n) if counted else None)
        at = int(lengths.argmax())
        if lengths[at] < min(CHANCE, len(said)) and reference is None:
            return 0.0
        run = min(1.0, float(lengths[at]) / self.run_words)
        starts = max(0, len(said) - self.n + 1)
        ngram = float((lengths[:starts] >= self.n).mean()) if starts else 0.0
        if self.measure == "run":
            return run
        if self.measure == "ngram":
            return ngram
        passage = reference or " ".join(self.index.words_around(int(places[at]) - at, len(said)))
        rouge = float(self.scorer.score(passage, completion)["rougeL"].fmeasure)
        return rouge if self.measure == "rouge" else (run + ngram + rouge) / 3


class CorpusIndex:
    """A suffix array over the words of several texts.

    Args:
        texts: the protected texts; no run crosses from one to the next.

    Raises:
        UserError: they hold no words.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.numbers: dict[str, int] = {}
        self.words: list[str] = []
        coded: list[int] = []
        for text in texts:
            for word in words(text):
                coded.append(self.numbers.setdefault(word, len(self.numbers)))
                self.words.append(word)
            coded.append(-1 - len(self.words))  # an end that matches nothing
            self.words.append("")
        if not self.numbers:
            raise UserError("The protected corpus holds no words.", where="reward leakage")
        self.corpus = coded
        self.suffixes: list[int] = suffix_array(np.array(coded, dtype=np.int64)).tolist()

    def matches(self, said: Sequence[str], enough: int | None = None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The longest run of the corpus that begins at each word, and where in the corpus it stands. (N,), (N,)

        Args:
            said: the words.
            enough: inside of a run that goes on for so many words no longer one is looked for, so that a page of the
                corpus said whole costs no more than its length; looked for at every word where none is given.
        """
        coded = [self.numbers.get(word, _UNKNOWN) for word in said]
        lengths, places = np.zeros(len(coded), dtype=np.int64), np.zeros(len(coded), dtype=np.int64)
        for at in range(len(coded)):
            if at and lengths[at - 1] > 1:  # what remains of the run before is a run too: begin there
                lengths[at], places[at] = lengths[at - 1] - 1, places[at - 1] + 1
                if enough is not None and lengths[at] >= enough:
                    continue
                self._longer(coded[at:], at, lengths, places)
            elif coded[at] != _UNKNOWN:
                self._longer(coded[at:], at, lengths, places)
        return lengths, places

    def words_around(self, start: int, count: int) -> list[str]:
        """`count` words of the corpus from `start` on."""
        start = max(0, min(start, len(self.words) - count))
        return [word for word in self.words[start : start + count] if word]

    def _longer(self, coded: list[int], at: int, lengths: NDArray[np.int64], places: NDArray[np.int64]) -> None:
        """Finds the suffix that shares most with `coded`: one of the two that it would stand between."""
        low, high = 0, len(self.suffixes)
        while low < high:
            middle = (low + high) // 2
            if self._before(self.suffixes[middle], coded):
                low = middle + 1
            else:
                high = middle
        for neighbour in (low - 1, low):
            if 0 <= neighbour < len(self.suffixes):
                place = self.suffixes[neighbour]
                shared = self._shared(place, coded)
                if shared > lengths[at]:
                    lengths[at], places[at] = shared, place

    def _before(self, place: int, coded: list[int]) -> bool:
        shared = self._shared(place, coded)
        if shared == len(coded):
            return False
        return place + shared >= len(self.corpus) or self.corpus[place + shared] < coded[shared]

    def _shared(self, place: int, coded: list[int]) -> int:
        shared, limit = 0, min(len(coded), len(self.corpus) - place)
        while shared < limit and self.corpus[place + shared] == coded[shared]:
            shared += 1
        return shared


_UNKNOWN = 2**62


def suffix_array(corpus: NDArray[np.int64]) -> NDArray[np.int64]:
    """Starts of the suffixes in order, told apart by their first `DEEPEST` words (prefix doubling)."""
    _, ranks = np.unique(corpus, return_inverse=True)
    ranks, order, width = ranks.astype(np.int64), np.argsort(ranks, kind="stable"), 1
    while width < DEEPEST:
        behind = np.full_like(ranks, -1)
        behind[:-width] = ranks[width:]
        order = np.lexsort((behind, ranks))
        first, second = ranks[order], behind[order]
        new = np.r_[0, np.cumsum((first[1:] != first[:-1]) | (second[1:] != second[:-1]))]
        ranks = np.empty_like(ranks)
        ranks[order] = new
        width *= 2
        if new[-1] == len(corpus) - 1 or width >= len(corpus):
            break
    return order.astype(np.int64)


class _Words:
    """The words of this project for rouge-score, which by itself knows Latin letters only."""

    def tokenize(self, text: str) -> list[str]:
        """As `words`."""
        return words(text)


def _texts(corpus: str) -> list[str]:
    found = []
    for row in read_rows(corpus):
        said = [
            row.columns[name] for name in ("text", "answer", "completion") if isinstance(row.columns.get(name), str)
        ]
        if not said:
            raise UserError("A protected row needs text, answer or completion.", where=row.where)
        found.append(said[0])
    return found
