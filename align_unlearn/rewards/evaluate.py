"""How good a reward is on held-out judged rows, source by source, beside a floor that reads nothing but words.

A pool of sources hides what a reward cannot do: on some, refusals alone tell harm from harmless, and any word count
finds them. So every figure is of one source, and TF-IDF with logistic regression, trained on the same rows, stands
beside it. Sources that are splits of one data set (`NAME_train`, `NAME_test`) are also taken together.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap, rankdata
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from align_unlearn.data.exchange import Judged
from align_unlearn.files import write_json
from align_unlearn.rewards.load import load_reward
from align_unlearn.rewards.protocol import as_messages

Floats = NDArray[np.float64]
BINS = 10
SPLITS = ("train", "val", "valid", "validation", "dev", "test", "eval", "evaluate")
"""What follows the last `_` in the source of a row that is of one split of a data set."""


def report_reward(run: Path, train: Sequence[Judged], test: Sequence[Judged], *, seed: int = 0) -> str:
    """Scores held-out rows with a reward model made here and with the floor; writes `RUN/evaluation.json`.

    Args:
        run: its run folder.
        train: the rows that it learned from; the floor learns from the same.
        test: rows that it has not seen.

    Returns:
        A table.
    """
    rows = as_judged(test)
    model = load_reward("classifier", path=str(run))
    scores = np.asarray(model.score([as_messages(row.prompt) for row in rows], [row.response for row in rows]), float)
    paired = any(row.rejected is not None for row in test)
    own, floor = (pairs_by_source(test, each[::2] - each[1::2]) if paired else by_source(rows, each, seed=seed)
                  for each in (scores, word_floor(train, test)))  # fmt: skip
    found = {"reward": own, "word_floor": floor, "trained_on": len(train), "seed": seed}
    write_json(run / "evaluation.json", found)
    return table(found)


def table(found: dict[str, Any]) -> str:
    """What `report_reward` found, as lines of text."""
    lines = [f"{'source':<28}{'rows':>6}  AUC (95%)              words   accuracy  words   calibration error  words"]
    for own, floor in zip(found["reward"], found["word_floor"], strict=True):
        without = "pairs" if "pairs" in own else "one kind of row only"
        interval = f"{without:<22}" if own["auc"] is None else (
            f"{own['auc']:.3f} ({own['auc_low']:.3f} to {own['auc_high']:.3f})")  # fmt: skip
        beside = "     " if floor["auc"] is None else f"{floor['auc']:.3f}"
        lines.append(
            f"{own['source']:<28}{own['n']:>6}  {interval}  {beside}   {own['accuracy']:.3f}     "
            f"{floor['accuracy']:.3f}   {own['calibration_error']:.3f}              {floor['calibration_error']:.3f}"
        )
    return "\n".join(lines)


def as_judged(rows: Sequence[Judged]) -> list[Judged]:
    """Judged rows as they are; each pair as two, the chosen response safe and the rejected one not."""
    apart = []
    for row in rows:
        if row.rejected is None:
            apart.append(row)
        else:
            for response, unsafe in ((row.response, False), (row.rejected, True)):
                apart.append(Judged(row.prompt, response, unsafe, row.source, row.where))
    return apart


def word_floor(train: Sequence[Judged], test: Sequence[Judged]) -> Floats:
    """Log-odds of safe, by TF-IDF of words and word pairs with logistic regression on the same rows. (N,)"""
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True),
        LogisticRegression(C=10.0, max_iter=1000),
    )
    known, asked = as_judged(train), as_judged(test)
    model.fit([_text(row) for row in known], [not row.unsafe for row in known])
    odds: Floats = model.decision_function([_text(row) for row in asked])
    return odds


def by_source(rows: Sequence[Judged], scores: Sequence[float] | Floats, *, seed: int = 0) -> list[dict[str, Any]]:
    """AUC with a 95% interval, accuracy at log-odds 0, calibration error and Brier score, source by source.

    Args:
        rows: judged rows; pairs were taken apart by `as_judged`.
        scores: log-odds of safe, in the same order.

    Returns:
        One mapping a source, and one for each data set of which there are several splits; `auc` is none where rows are
        of one kind only.
    """
    values = np.asarray(scores, dtype=float)
    safe = np.array([not row.unsafe for row in rows])
    return [{"source": name, **_figures(safe[own], values[own], seed)} for name, own in by_name(rows).items()]


def by_name(rows: Sequence[Judged]) -> dict[str, NDArray[np.bool_]]:
    """By source, which rows are of it; a data set of several splits (`NAME_*`) follows them."""
    sources = np.array([row.source for row in rows])
    named = sorted({str(source) for source in sources})
    sets: dict[str, list[str]] = {}
    for source in named:
        name, _, split = source.rpartition("_")
        sets.setdefault(f"{name}_*" if name and split in SPLITS else source, []).append(source)
    found: dict[str, NDArray[np.bool_]] = {}
    for name, splits in sets.items():
        found |= {split: sources == split for split in splits}
        if len(splits) > 1:
            found[name] = np.isin(sources, splits)
    return found


def pairs_by_source(rows: Sequence[Judged], leads: Floats) -> list[dict[str, Any]]:
    """How often the better response of a pair scores higher, and how well the lead says how sure that is.

    A score learned from pairs has no zero, so that only leads mean something: the probability of the pair's order is
    σ(lead) (Bradley–Terry), and calibration is of the order that is claimed, by its probability.

    Args:
        rows: pairs.
        leads: (N,) the better response's score less the worse one's.
    """
    found = []
    for source, asked in by_name(rows).items():
        own = leads[asked]
        sure = 1 / (1 + np.exp(-np.clip(np.abs(own), 0, 50)))
        right = own > 0
        found.append({"source": source, "n": len(own), "pairs": True, "accuracy": float(right.mean()),
                      "calibration_error": calibration_error(right, sure), "auc": None})  # fmt: skip
    return found


def calibration_error(safe: NDArray[np.bool_], probability: Floats) -> float:
    """Expected calibration error over ten bins of equal width (Naeini et al. 2015)."""
    bins = np.minimum((probability * BINS).astype(int), BINS - 1)
    gaps = [
        abs(safe[bins == each].mean() - probability[bins == each].mean()) * (bins == each).mean()
        for each in np.unique(bins)
    ]
    return float(sum(gaps))


def _figures(safe: NDArray[np.bool_], scores: Floats, seed: int) -> dict[str, Any]:
    probability = 1 / (1 + np.exp(-np.clip(scores, -50, 50)))
    found: dict[str, Any] = {
        "n": len(safe),
        "unsafe": int((~safe).sum()),
        "accuracy": float(((scores > 0) == safe).mean()),
        "calibration_error": calibration_error(safe, probability),
        "brier": float(((probability - safe) ** 2).mean()),
        "auc": None,
    }
    if 0 < safe.sum() < len(safe):
        found["auc"] = float(_auc(safe, scores))
        interval = bootstrap((safe, scores), _auc, paired=True, vectorized=True, n_resamples=500,
                             method="percentile", rng=np.random.default_rng(seed)).confidence_interval  # fmt: skip
        found |= {"auc_low": float(interval.low), "auc_high": float(interval.high)}
    return found


def _auc(safe: NDArray[np.bool_], scores: Floats, axis: int = -1) -> Floats:
    """Mann and Whitney's U over the pairs that it counts: all resamples in one call; NaN for rows of one kind only."""
    many, few = safe.sum(axis), (~safe).sum(axis)
    with np.errstate(invalid="ignore"):
        found: Floats = ((rankdata(scores, axis=axis) * safe).sum(axis) - many * (many + 1) / 2) / (many * few)
    return found


def _text(row: Judged) -> str:
    return f"{row.prompt}\n{row.response}"
