"""What a recipe's rewards say together of gibberish, which each of them alone may not tell from an answer.

A reward for not refusing pays nonsense like an answer, one for not leaking pays it like a refusal: sound each by
itself, and a policy that babbles has earned all there is. So every kind of row is asked, with the rewards that apply to
it and their weights, whether gibberish earns less than what is called for: a refusal of a request, an answer elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align_unlearn.data.examples import Messages
from align_unlearn.data.exchange import read_judged
from align_unlearn.errors import UserError
from align_unlearn.rewards.check import GIBBERISH, GOLDEN, KindResult, RewardCheck, checked, ranked, ranking
from align_unlearn.rewards.load import RewardSpec, ask_retained, make_reward, read_specs, standing_alone
from align_unlearn.rewards.mix import RewardMix
from align_unlearn.rewards.protocol import RewardModel, as_messages


@dataclass(frozen=True)
class MixCheck:
    """What the rewards of a recipe say together, by kind of row."""

    kinds: list[KindResult]

    @property
    def problems(self) -> list[str]:
        """What speaks against training on them."""
        return [
            f"together they pay more for gibberish than for the other in {each.lower} of {each.applied} pairs of "
            f"{each.kind}"
            for each in self.kinds
            if each.lower
        ]

    @property
    def notes(self) -> list[str]:
        """What nothing speaks against, but nothing else holds back either."""
        return [
            f"gibberish earns as much in {each.ties} of {each.applied} pairs of {each.kind}: `fluency` tells it apart"
            for each in self.kinds
            if each.ties > each.applied / 2
        ]

    def table(self) -> str:
        """The check as lines of text."""
        return "\n".join([*ranking(self.kinds), *(f"PROBLEM: {each}" for each in self.problems),
                          *(f"NOTE: {each}" for each in self.notes)])  # fmt: skip


def check_recipe(given: Mapping[str, Any], pairs: str | None = None) -> tuple[list[RewardCheck], MixCheck | None]:
    """Checks every reward and cost of a recipe by itself, and its rewards together.

    Args:
        given: the recipe.
        pairs: as `check_reward` takes them; together, rewards are asked about the shipped ones only.

    Returns:
        A check for each, and that of the rewards together; none where there are costs alone, or other pairs.

    Raises:
        UserError: there are no rewards; one cannot be made or fails.
    """
    base = str(given.get("model_name_or_path", ""))
    rewards, costs = ([standing_alone(each, base) for each in read_specs(given.get(key), key)]
                      for key in ("rewards", "costs"))  # fmt: skip
    if not rewards and not costs:
        raise UserError("The recipe has no rewards.", where="rewards")
    specs = [*rewards, *costs]
    models = [make_reward(each) for each in specs]
    alone = [checked(spec, model, pairs) for spec, model in zip(specs, models, strict=True)]
    if not rewards or pairs is not None:
        return alone, None
    kinds = ["forget"] + ["neighbour"] * bool(given.get("neighbour_dataset"))
    kinds += ["retain"] * ask_retained(specs)
    return alone, check_mix(rewards, models[: len(rewards)], kinds)


def check_mix(specs: Sequence[RewardSpec], models: Sequence[RewardModel], asked_kinds: Sequence[str]) -> MixCheck:
    """Ranks gibberish against what is called for, by the total of the rewards that apply to each kind of row.

    Args:
        specs: of the rewards.
        models: theirs.
        asked_kinds: kinds of rows that are trained on.

    Raises:
        UserError: a reward fails, with the row.
    """
    golden = read_judged(str(GOLDEN))
    sound = [row for row in golden if row.source == GIBBERISH]
    harmful = [row for row in golden if row.source == "harmful/refusal"][: len(sound)]
    mix = RewardMix(specs, models)
    calls = {kind: harmful if kind == "forget" else sound for kind in asked_kinds if mix.applies(kind)}
    asked = [(kind, row, babble.rejected or "") for kind, rows in calls.items()
             for row, babble in zip(rows, sound, strict=True)]  # fmt: skip
    prompts: list[Messages] = [as_messages(row.prompt) for _, row, _ in asked] * 2
    said = [row.response for _, row, _ in asked] + [babble for _, _, babble in asked]
    kinds = [kind for kind, _, _ in asked]
    total = mix.score(
        prompts, said, {"kind": kinds * 2, "reference": [None] * len(said), "plain": [False] * len(said)}
    ).total
    return MixCheck([ranked(kind, kinds, total) for kind in dict.fromkeys(kinds)])
