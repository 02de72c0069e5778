"""TOFU's two headline figures in their published definitions: forget quality and model utility (arXiv:2401.06121).

An evaluation is a table of per-row figures for each of four sets. Nine numbers (probability, ROUGE-L recall and truth
ratio on retain, real authors and world facts) give the model utility, their harmonic mean; the truth ratios on the
forget set, compared with those of a model trained on the retain rows alone, give the forget quality, the p value of a
two-sample Kolmogorov–Smirnov test. The logs that the benchmark's authors published are such tables too
(`read_published`), and these functions give their figures.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from align_unlearn.errors import UserError

UTILITY_SETS = ("retain", "real_authors", "world_facts")
PUBLISHED_SETS = {
    "eval_log_forget.json": "forget",
    "eval_log.json": "retain",
    "eval_real_author_wo_options.json": "real_authors",
    "eval_real_world_wo_options.json": "world_facts",
}


@dataclass(frozen=True)
class TofuRow:
    """What is measured on one question. All losses are nats a token, means over an answer's tokens.

    Attributes:
        answer_loss: of the true answer.
        paraphrase_loss: of the true answer in other words (of the answer itself where there is no paraphrase).
        perturbed_losses: of each wrong answer.
        rouge_recall: ROUGE-L recall of the greedy answer against the true one.
        extraction_strength: share of the true answer that greedy decoding gives from the shortest prefix after which
            all of the rest comes; 0 when its last token does not. nan where it was not measured (published logs).
        exact_memorisation: share of the true answer's tokens that are the likeliest; nan likewise.
    """

    answer_loss: float
    paraphrase_loss: float
    perturbed_losses: tuple[float, ...]
    rouge_recall: float
    extraction_strength: float = math.nan
    exact_memorisation: float = math.nan

    @property
    def probability(self) -> float:
        """exp(−loss) of the true answer."""
        return float(np.exp(-self.answer_loss))

    @property
    def normalised_probability(self) -> float:
        """Probability of the true answer among it and the wrong ones: on sets that were not trained on."""
        wrong = np.exp(-np.asarray(self.perturbed_losses))
        return float(self.probability / (self.probability + wrong.sum()))

    @property
    def truth_ratio(self) -> float:
        """exp(paraphrase loss − mean wrong loss), above 1 where the wrong answers (geometric mean) are likelier.

        The published figures need this form throughout; the paper's formula has an arithmetic mean.
        """
        return float(np.exp(self.paraphrase_loss - np.mean(self.perturbed_losses)))


Evaluation = Mapping[str, Sequence[TofuRow]]


def forget_quality(unlearned: Evaluation, retained: Evaluation) -> float:
    """p value that the truth ratios on the forget set are those of a model that never saw it.

    Raises:
        UserError: one of the two has no forget rows.
    """
    for evaluation in (unlearned, retained):
        if not evaluation.get("forget"):
            raise UserError("Forget quality needs the truth ratios of both models on the forget set.", where="forget")
    ours, theirs = ([row.truth_ratio for row in each["forget"]] for each in (unlearned, retained))
    return float(stats.ks_2samp(ours, theirs).pvalue)


def utility_parts(evaluation: Evaluation) -> dict[str, float]:
    """The nine numbers of model utility, by `set.metric`.

    Raises:
        UserError: a set is missing.
    """
    parts = {}
    for name in UTILITY_SETS:
        rows = evaluation.get(name)
        if not rows:
            raise UserError(f"Model utility needs the set '{name}'.", where=name)
        plain = [row.probability if name == "retain" else row.normalised_probability for row in rows]
        parts[f"{name}.probability"] = float(np.mean(plain))
        parts[f"{name}.rouge"] = float(np.mean([row.rouge_recall for row in rows]))
        parts[f"{name}.truth_ratio"] = float(np.mean([max(0.0, 1 - row.truth_ratio) for row in rows]))
    return parts


def model_utility(evaluation: Evaluation) -> float:
    """Harmonic mean of the nine; 0 where one of them is 0."""
    return float(stats.hmean(list(utility_parts(evaluation).values())))


def tofu_figures(evaluation: Evaluation, retained: Evaluation | None) -> dict[str, float]:
    """The figures of one model by name: the two headline ones, then means over the forget rows and the retain rows.

    Args:
        evaluation: of the model.
        retained: of the model that was taught the retain rows alone; without one there is no `forget_quality`.

    Raises:
        UserError: a set is missing.
    """
    figures = {} if retained is None else {"forget_quality": forget_quality(evaluation, retained)}
    figures["model_utility"] = model_utility(evaluation)
    for name in ("forget", "retain"):
        rows = evaluation.get(name)
        if not rows:
            raise UserError(f"The set '{name}' was not asked.", where=name)
        ratios = np.asarray([row.truth_ratio for row in rows])
        likeness = np.minimum(ratios, 1 / ratios) if name == "forget" else np.maximum(0.0, 1 - ratios)
        figures |= {
            f"{name}.probability": float(np.mean([row.probability for row in rows])),
            f"{name}.rouge_l": float(np.mean([row.rouge_recall for row in rows])),
            f"{name}.truth_ratio": float(np.mean(likeness)),
            f"{name}.extraction_strength": float(np.mean([row.extraction_strength for row in rows])),
            f"{name}.exact_memorisation": float(np.mean([row.exact_memorisation for row in rows])),
        }
    return figures


def read_published(path: str | Path) -> dict[str, list[TofuRow]]:
    """A log in the form that the benchmark's authors published.

    Raises:
        UserError: the file is not such a log.
    """
    try:
        log: dict[str, Any] = json.loads(Path(path).read_text("utf-8"))
        return {name: _published_rows(log[key]) for key, name in PUBLISHED_SETS.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"This is not a published TOFU log: {error}.", where=str(path)) from error


def _published_rows(log: Mapping[str, Mapping[str, Any]]) -> list[TofuRow]:
    return [
        TofuRow(
            answer_loss=loss,
            paraphrase_loss=log["avg_paraphrased_loss"][key],
            perturbed_losses=tuple(log["average_perturb_loss"][key]),
            rouge_recall=log["rougeL_recall"][key],
        )
        for key, loss in log["avg_gt_loss"].items()
    ]
