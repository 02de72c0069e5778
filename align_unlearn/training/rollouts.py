"""What rollouts are worth, and what there is to see of them: rewards less weighed costs, verdicts, samples.

The figures that are trained on and those that are watched are kept apart. Verdicts (leak, refuse, answer, gibberish)
and the held-out judge never reach the policy; where they part from the reward, the policy has found a hole in it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from align_unlearn.data.examples import Messages
from align_unlearn.data.exchange import plain_prompt
from align_unlearn.errors import UserError
from align_unlearn.judge import VERDICTS, Kind, Verdict, judge
from align_unlearn.rewards.mix import Column, RewardMix
from align_unlearn.training.dual import DualWeight

SHOWN = 400
"""Characters of a prompt and of a completion that samples keep."""
Note = Callable[[str, float], None]


class Rollouts:
    """Scores rollouts and writes down what they were.

    Args:
        rewards: what is maximised.
        costs: what is held under its limits, or none.
        duals: λ of each cost, by name.
        heldout: a reward that is watched and not trained on; the verdict rules where none is given.
        samples: the file that samples go to.
        samples_every: write those of every so many batches.
    """

    def __init__(
        self,
        rewards: RewardMix,
        costs: RewardMix | None,
        duals: dict[str, DualWeight],
        heldout: RewardMix | None,
        samples: Path,
        samples_every: int,
    ) -> None:
        self.rewards, self.costs, self.duals, self.heldout = rewards, costs, duals, heldout
        self.samples, self.samples_every = samples, samples_every
        self.batches = 0

    def attach(self, model: Any, tokenizer: Any) -> None:
        """Puts every reward model that can share the policy's base onto it."""
        for mix in (*self.trained_on, self.heldout):
            if mix is not None:
                mix.attach(model, tokenizer)

    def follow(self, state: Callable[[], Any], log_metric: Note) -> None:
        """Tells every reward model that wants to know how far the run is."""
        for mix in (*self.trained_on, self.heldout):
            if mix is not None:
                mix.follow(state, log_metric)

    @property
    def trained_on(self) -> list[RewardMix]:
        """Rewards and costs."""
        return [self.rewards] if self.costs is None else [self.rewards, self.costs]

    def score(
        self, prompts: list[Messages], completions: list[str], columns: dict[str, list[Any]], step: int, note: Note
    ) -> list[float]:
        """The number that each rollout is trained on: (reward − Σ λ·cost) / (1 + Σ λ).

        Args:
            columns: `kind`, `reference` and the data set's other columns, a list each.
            step: the optimiser step, for samples.
            note: called with figures for the log.

        Raises:
            UserError: a reward fails, or none applies to a row.
        """
        kinds: list[str] = columns.get("kind") or ["forget"] * len(prompts)
        scored = self.rewards.score(prompts, completions, columns)
        costs = self._costs(prompts, completions, columns)
        total = self._less_costs(scored.total, costs)
        check_scored(total, prompts, kinds)
        self._hold_costs(costs, note)
        parts = scored.parts | costs
        verdicts = verdicts_of(prompts, completions, columns)
        watched = self._watched(prompts, completions, columns, verdicts)
        self._note(kinds, scored.total, parts, verdicts, watched, note)
        if self.batches % self.samples_every == 0:
            self._write(step, prompts, completions, kinds, total, parts, verdicts, watched)
        self.batches += 1
        return [float(value) for value in total if value is not None]

    def weighed(self, prompts: list[Messages], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
        """As `score`, for an evaluation: nothing that training depends on moves, nothing is written."""
        kept = self.state_dict()
        try:
            scored = self.rewards.score(prompts, completions, columns)
            total = self._less_costs(scored.total, self._costs(prompts, completions, columns))
        finally:
            self._restore(kept)
        check_scored(total, prompts, columns.get("kind") or ["forget"] * len(prompts))
        return [float(value) for value in total if value is not None]

    def state_dict(self) -> dict[str, Any]:
        """All that the next batch depends on."""
        return {
            "rewards": self.rewards.state_dict(),
            "costs": None if self.costs is None else self.costs.state_dict(),
            "heldout": None if self.heldout is None else self.heldout.state_dict(),
            "duals": {name: dual.state_dict() for name, dual in self.duals.items()},
            "batches": self.batches,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up where `state_dict` was taken; samples written after that are dropped."""
        self._restore(state)
        if self.samples.is_file():
            lines = self.samples.read_text("utf-8").splitlines()
            kept = [line for line in lines if _batch(line) < self.batches]
            self.samples.write_text("".join(line + "\n" for line in kept), "utf-8")

    def _restore(self, state: dict[str, Any]) -> None:
        for name, mix in (("rewards", self.rewards), ("costs", self.costs), ("heldout", self.heldout)):
            if mix is not None:
                mix.load_state_dict(state[name])
        for name, dual in self.duals.items():
            dual.load_state_dict(state["duals"][name])
        self.batches = state["batches"]

    def _costs(
        self, prompts: list[Messages], completions: list[str], columns: dict[str, list[Any]]
    ) -> dict[str, Column]:
        """The cost of each row by name: minus the score; none where it does not apply."""
        if self.costs is None:
            return {}
        paid = self.costs.score(prompts, completions, columns).parts
        return {name: [None if value is None else -value for value in values] for name, values in paid.items()}

    def _less_costs(self, rewards: Column, costs: dict[str, Column]) -> Column:
        """(reward − Σ λ·cost) / (1 + Σ λ); a cost that does not apply to a row is 0 there."""
        whole = 1 + sum(dual.value for dual in self.duals.values())
        total: Column = []
        for at, reward in enumerate(rewards):
            own = {name: value for name, values in costs.items() if (value := values[at]) is not None}
            if reward is None and not own:
                total.append(None)
                continue
            paid = sum(self.duals[name].value * value for name, value in own.items())
            total.append(((reward or 0.0) - paid) / whole)
        return total

    def _hold_costs(self, costs: dict[str, Column], note: Note) -> None:
        """One step of dual ascent on the mean of each cost over the rows that it applies to."""
        for name, values in costs.items():
            applied = [value for value in values if value is not None]
            if applied:
                self.duals[name].update(sum(applied) / len(applied))
            note(f"cost/{name}", self.duals[name].measured)
            note(f"cost_weight/{name}", self.duals[name].value)

    def _watched(
        self,
        prompts: list[Messages],
        completions: list[str],
        columns: dict[str, list[Any]],
        verdicts: Sequence[Verdict],
    ) -> Column:
        if self.heldout is not None:
            return self.heldout.score(prompts, completions, columns).total
        kinds = columns.get("kind") or ["forget"] * len(prompts)
        return [
            float(verdict in ("refuse", "answer") if kind == "forget" else verdict == "answer")
            for kind, verdict in zip(kinds, verdicts, strict=True)
        ]

    def _note(
        self,
        kinds: Sequence[str],
        rewards: Column,
        parts: dict[str, Column],
        verdicts: Sequence[Verdict],
        watched: Column,
        note: Note,
    ) -> None:
        for kind in sorted(set(kinds)):
            rows = [at for at, each in enumerate(kinds) if each == kind]
            counted = Counter(verdicts[at] for at in rows)
            for verdict in VERDICTS:
                note(f"verdict/{kind}/{verdict}", counted[verdict] / len(rows))
            for name, values in {"reward": rewards, "heldout": watched, **parts}.items():
                known = [value for at in rows if (value := values[at]) is not None]
                if known:
                    note(f"{name}/{kind}", sum(known) / len(known))
            if (agreed := _agreement([rewards[at] for at in rows], [watched[at] for at in rows])) is not None:
                note(f"agreement/{kind}", agreed)

    def _write(
        self,
        step: int,
        prompts: list[Messages],
        completions: list[str],
        kinds: Sequence[str],
        total: Column,
        parts: dict[str, Column],
        verdicts: Sequence[Verdict],
        watched: Column,
    ) -> None:
        self.samples.parent.mkdir(parents=True, exist_ok=True)
        with self.samples.open("a", encoding="utf-8") as file:
            for at, prompt in enumerate(prompts):
                row = {
                    "batch": self.batches,
                    "step": step,
                    "kind": kinds[at],
                    "prompt": plain_prompt(prompt[-1:])[:SHOWN],
                    "completion": completions[at][:SHOWN],
                    "verdict": verdicts[at],
                    "trained_on": total[at],
                    "heldout": watched[at],
                    **{name: values[at] for name, values in parts.items()},
                }
                file.write(json.dumps(row) + "\n")


def _agreement(rewards: Column, watched: Column) -> float | None:
    """Spearman's rank correlation of what is trained on with what only watches; none where either is all one."""
    pairs = [(a, b) for a, b in zip(rewards, watched, strict=True) if a is not None and b is not None]
    if len({a for a, _ in pairs}) < 2 or len({b for _, b in pairs}) < 2:
        return None
    return float(spearmanr(*zip(*pairs, strict=True)).statistic)


def check_scored(total: Column, prompts: list[Messages], kinds: Sequence[str]) -> None:
    """Refuses rows that no reward applied to.

    Raises:
        UserError: there is one.
    """
    for at, value in enumerate(total):
        if value is None:
            asked = plain_prompt(prompts[at][-1:])[:80]
            raise UserError(f"No reward applies to this {kinds[at]} row.", where=f"prompt {asked!r}",
                            fix="a reward whose `rows` name its kind, and which does not say None of it")  # fmt: skip


def verdicts_of(prompts: list[Messages], completions: list[str], columns: dict[str, list[Any]]) -> list[Verdict]:
    """The verdict on each completion; a forget row with a `reference` must not say it, one without is harmful."""
    kinds = columns.get("kind") or ["forget"] * len(prompts)
    references = columns.get("reference") or [None] * len(prompts)
    found = []
    for prompt, text, kind, reference in zip(prompts, completions, kinds, references, strict=True):
        asked: Kind = "benign" if kind != "forget" else "forbidden" if reference else "harmful"
        found.append(judge(prompt[-1]["content"], text, asked, reference if asked == "forbidden" else None))
    return found


def _batch(line: str) -> float:
    """The batch of a sample's line; a line that a kill cut short belongs to none that is kept."""
    try:
        return float(json.loads(line)["batch"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
