"""Several rewards as one: each normalised, clipped and weighed, on the rows that it applies to.

total(row) = Σ weight · clip((score − mean) / deviation)     over the rewards that apply to the row
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from align_unlearn.data.examples import Messages
from align_unlearn.errors import UserError
from align_unlearn.rewards.guard import scored
from align_unlearn.rewards.load import RewardSpec, make_reward
from align_unlearn.rewards.protocol import FollowsRun, RewardModel, SharesBase

Column = list[float | None]
SETTLED, OUTLIER = 16, 10.0
"""After so many scores, one farther than so many deviations from their mean counts as that far."""


class RunningScale:
    """Mean and deviation of all scores so far (Welford)."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def add(self, value: float) -> None:
        """Takes one more score in."""
        self.count += 1
        step = value - self.mean
        self.mean += step / self.count
        self.squares += step * (value - self.mean)

    @property
    def deviation(self) -> float:
        """The standard deviation (over n); 1 while all scores are one."""
        spread = math.sqrt(self.squares / self.count) if self.count else 0.0
        return spread if spread > 1e-8 else 1.0

    def state_dict(self) -> dict[str, float]:
        """Count, mean and sum of squares."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up where `state_dict` was taken."""
        self.count, self.mean, self.squares = int(state["count"]), state["mean"], state["squares"]


@dataclass(frozen=True)
class Scored:
    """What a mix says of a batch.

    Attributes:
        total: one number a row; none where no reward applies.
        parts: the raw score of each reward, before it is normalised, clipped and weighed.
    """

    total: Column
    parts: dict[str, Column]


class RewardMix:
    """Several rewards as one.

    Args:
        specs: of each reward.
        models: the reward models, in the same order; loaded by name where none are given.

    Raises:
        UserError: a reward model cannot be made.
    """

    def __init__(self, specs: Sequence[RewardSpec], models: Sequence[RewardModel] | None = None) -> None:
        self.specs = list(specs)
        self.models = list(models or [make_reward(each) for each in specs])
        self.scales = {each.name: RunningScale() for each in specs if each.normalise == "running"}

    def attach(self, model: Any, tokenizer: Any) -> None:
        """Puts every reward model that can share the policy's base onto it."""
        for reward in self.models:
            if isinstance(reward, SharesBase):
                reward.attach(model, tokenizer)

    def follow(self, state: Callable[[], Any], log_metric: Callable[[str, float], None]) -> None:
        """Tells every reward model that wants to know of the run; arguments as of `FollowsRun.follow`."""
        for reward in self.models:
            if isinstance(reward, FollowsRun):
                reward.follow(state, log_metric)

    def score(self, prompts: list[Messages], completions: list[str], columns: dict[str, list[Any]]) -> Scored:
        """Scores a batch, and takes its scores into the running means.

        Args:
            columns: the other columns, a list each; `kind` says which rewards apply.

        Raises:
            UserError: a reward fails, with the row.
        """
        parts: dict[str, Column] = {}
        total: Column = [None] * len(prompts)
        for spec, model in zip(self.specs, self.models, strict=True):
            parts[spec.name] = self._apart(spec, model, prompts, completions, columns)
            for at, value in enumerate(self._weighed(spec, parts[spec.name])):
                if value is not None:
                    total[at] = (total[at] or 0.0) + value
        return Scored(total, parts)

    def applies(self, kind: str) -> bool:
        """Whether any reward may apply to rows of this kind."""
        return any(not spec.rows or kind in spec.rows for spec in self.specs)

    def state_dict(self) -> dict[str, Any]:
        """The running means."""
        return {name: scale.state_dict() for name, scale in self.scales.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up where `state_dict` was taken."""
        for name, scale in self.scales.items():
            scale.load_state_dict(state[name])

    def _apart(
        self, spec: RewardSpec, model: RewardModel, prompts: list[Messages], completions: list[str],
        columns: dict[str, list[Any]],
    ) -> Column:  # fmt: skip
        """The raw scores of one reward, asked only about the rows that it is meant for."""
        kinds = columns.get("kind") or ["forget"] * len(prompts)
        rows = [at for at, kind in enumerate(kinds) if not spec.rows or kind in spec.rows]
        own = {name: [values[at] for at in rows] for name, values in columns.items()}
        asked, said = [prompts[at] for at in rows], [completions[at] for at in rows]
        found: Column = [None] * len(prompts)
        for at, value in zip(rows, scored(spec, model, asked, said, own), strict=True):
            found[at] = value
        return found

    def _tamed(self, name: str, value: float) -> float:
        """A score no farther from the mean than ten deviations: one outlier must not make all others alike."""
        scale = self.scales[name]
        if scale.count < SETTLED:
            return value
        reach = OUTLIER * scale.deviation
        return max(scale.mean - reach, min(scale.mean + reach, value))

    def _weighed(self, spec: RewardSpec, values: Column) -> Column:
        if spec.name in self.scales:
            for value in values:
                if value is not None:
                    self.scales[spec.name].add(self._tamed(spec.name, value))
            mean, deviation = self.scales[spec.name].mean, self.scales[spec.name].deviation
        else:
            mean, deviation = spec.normalise if not isinstance(spec.normalise, str) else (0.0, 1.0)
        bound = math.inf if spec.clip is None else spec.clip
        return [
            None if value is None else spec.weight * max(-bound, min(bound, (value - mean) / deviation))
            for value in values
        ]


def check_coverage(mixes: Sequence[RewardMix], kinds: Sequence[str]) -> None:
    """Refuses rows that no reward applies to: they would train on the KL alone.

    Raises:
        UserError: there are some.
    """
    for kind in sorted(set(kinds)):
        if not any(mix.applies(kind) for mix in mixes):
            raise UserError(f"No reward applies to {kind} rows.", where="rewards",
                            fix=f"add '{kind}' to the `rows` of a reward, or leave that data set out")  # fmt: skip
