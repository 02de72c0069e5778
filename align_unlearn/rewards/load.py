"""From a name in a recipe to a reward model.

    rewards:
      safe: {model: classifier, kwargs: {path: runs/reward}, weight: 1.0, normalise: running, clip: 3}
      open: {model: my_rewards.py:Openness, rows: [neighbour, retain]}

`model` is an entry point of the group `align_unlearn.reward_models`, `module:Class` or `file.py:Class`; a plain
function is taken as a TRL reward function.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import inspect
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from align_unlearn.errors import UserError, unknown_name
from align_unlearn.imports import import_by_name
from align_unlearn.rewards.protocol import FromTRL, RewardModel

GROUP = "align_unlearn.reward_models"
KINDS = ("forget", "neighbour", "retain")
TAKEN = frozenset(
    "agreement batch completion cost cost_weight heldout kind prompt reward step trained_on verdict".split()
)
"""Names that stand for something else in logs and samples."""


@dataclass(frozen=True)
class RewardSpec:
    """One reward of a recipe.

    Attributes:
        name: its name in logs.
        model: an entry point, `module:Class`, `file.py:Class`, or the name itself where none is given.
        kwargs: what the class is made with.
        weight: what its score is multiplied by, after the rest.
        normalise: `none`, `running` (mean and deviation of all scores so far), or `[mean, deviation]`.
        clip: largest magnitude after normalising, or none.
        rows: the kinds of rows that it applies to; all where none are named.
        timeout: seconds that scoring a batch may take, or none.
        limit: of a cost: what its mean is to stay at or under.
        sign: -1 where a high score is bad (a classifier of harm); the score is multiplied by it before anything else.
    """

    name: str
    model: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    normalise: str | tuple[float, float] = "none"
    clip: float | None = None
    rows: tuple[str, ...] = ()
    timeout: float | None = None
    limit: float | None = None
    sign: float = 1.0

    def __post_init__(self) -> None:
        where = f"reward {self.name}"
        if not (isinstance(self.weight, (int, float)) and math.isfinite(self.weight)):
            raise UserError(f"weight is {self.weight!r}, not a number.", where=where)
        if self.sign not in (1, -1):
            raise UserError(f"sign is {self.sign:g}; it is 1, or -1 where a high score is bad.", where=where)
        if isinstance(self.normalise, str) and self.normalise not in ("none", "running"):
            raise unknown_name("normalise", self.normalise, ["none", "running"], where=where)
        if not isinstance(self.normalise, str) and not self.normalise[1] > 0:
            raise UserError("Fixed normalisation is [mean, deviation], the deviation above 0.", where=where)
        fixed = () if isinstance(self.normalise, str) else self.normalise
        if not all(math.isfinite(value) for value in (*fixed, self.limit or 0.0)):
            raise UserError("limit and normalise are finite numbers.", where=where)
        for name in ("clip", "timeout"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise UserError(f"{name} must be above 0.", where=where)
        for kind in self.rows:
            if kind not in KINDS:
                raise unknown_name("kind of rows", kind, KINDS, where=where)


def check_apart(rewards: Sequence[RewardSpec], costs: Sequence[RewardSpec]) -> None:
    """Refuses names that logs and samples could not tell apart.

    Raises:
        UserError: a reward and a cost have one name, or one of them a name that stands for something else.
    """
    for spec in (*rewards, *costs):
        if spec.name in TAKEN:
            raise UserError(f"'{spec.name}' means something else in logs and samples.", where="rewards / costs",
                            fix="another name; `model` says which reward it is")  # fmt: skip
    if both := {spec.name for spec in rewards} & {spec.name for spec in costs}:
        raise UserError(f"A reward and a cost are both called '{min(both)}'.", where="rewards / costs",
                        fix="another name for one; `model` says which it is")  # fmt: skip


def check_judge(judges: Sequence[RewardSpec], trained_on: Sequence[RewardSpec]) -> None:
    """Refuses a held-out judge that the policy is trained on: it would agree with the reward in every hole.

    Args:
        judges: what the recipe's `heldout_judge` names.
        trained_on: the rewards and costs.

    Raises:
        UserError: it is one of them, by the same name and with the same arguments; or there are several.
    """
    if len(judges) > 1:
        raise UserError("There is one held-out judge.", where="heldout_judge")
    for judge in judges:
        for spec in trained_on:
            if (spec.model, spec.kwargs) == (judge.model, judge.kwargs):
                raise UserError(
                    f"The held-out judge is '{spec.name}', which the policy is trained on: it would see no hole.",
                    where=f"heldout_judge: {judge.name}",
                    fix="another model, or other arguments; left out, the verdict rules are watched",
                )


def ask_retained(specs: Sequence[RewardSpec]) -> bool:
    """Whether prompts to retain are asked in training: only where a reward or a cost names them."""
    return any("retain" in spec.rows for spec in specs)


def read_specs(given: Any, key: str = "rewards") -> list[RewardSpec]:
    """The rewards of a recipe: a mapping of names to settings, or its JSON.

    Raises:
        UserError: it is no such mapping, or a setting is unknown or of the wrong kind.
    """
    try:
        found = json.loads(given) if isinstance(given, str) else given or {}
    except json.JSONDecodeError as error:
        raise UserError(f"{key} is not JSON: {error.msg}.", where=key) from error
    if not isinstance(found, dict):
        raise UserError(f"{key} maps names to settings.", where=key, fix="harm: {model: keywords, weight: 1.0}")
    return [_spec(str(name), settings or {}, key) for name, settings in found.items()]


def load_reward(name: str, /, **kwargs: Any) -> RewardModel:
    """A reward model by name, made with `kwargs`.

    Raises:
        UserError: there is none of that name, its arguments do not fit, or it cannot be made.
    """
    return make_reward(RewardSpec(name=name, model=name, kwargs=kwargs))


def make_reward(spec: RewardSpec) -> RewardModel:
    """The reward model of a recipe's entry.

    Raises:
        UserError: there is none of that name, its arguments do not fit, or it cannot be made.
    """
    model, kwargs, where = spec.model, spec.kwargs, f"reward {spec.name}"
    found = _named(model)
    whole = _unwrapped(found)
    if inspect.isfunction(whole):
        return FromTRL(found, **kwargs)
    if isinstance(whole, type) or (callable(found) and not hasattr(found, "score")):
        return _made(found, model, where, kwargs)
    if kwargs:
        raise UserError(f"{model} is an object, not a class: it takes no arguments.", where=where)
    return _checked(found, model, where)


def judge_spec(given: Any, base: str) -> RewardSpec | None:
    """The reward that a recipe's `audit_judge` names, to judge answers beside the rules; none where it names none.

    Args:
        given: the recipe's key.
        base: the recipe's `model_name_or_path`.

    Raises:
        UserError: it names several, or says of one what only training asks for.
    """
    specs = read_specs(given, "audit_judge")
    if not specs:
        return None
    if len(specs) > 1:
        raise UserError("There is one judge of audits.", where="audit_judge")
    plain = RewardSpec(specs[0].name, specs[0].model, specs[0].kwargs)
    if specs[0] != plain:
        raise UserError("A judge gives its own scores: it has a model and kwargs.", where=f"audit_judge: {plain.name}",
                        fix="leave weight, sign, limit, rows and the like out")  # fmt: skip
    return standing_alone(plain, base)


def standing_alone(spec: RewardSpec, base: str) -> RewardSpec:
    """The entry for use without a policy: what would ask the policy's original asks the model of that name instead.

    Args:
        spec: of a recipe.
        base: the recipe's `model_name_or_path`.

    Raises:
        UserError: there is no such reward model.
    """
    found = _named(spec.model)
    path = inspect.signature(found).parameters.get("path") if isinstance(_unwrapped(found), type) else None
    if path is None or path.default is not None or "path" in spec.kwargs:
        return spec
    return dataclasses.replace(spec, kwargs={**spec.kwargs, "path": base})


def entry_points() -> dict[str, Any]:
    """The installed reward models by name."""
    return {point.name: point for point in importlib.metadata.entry_points(group=GROUP)}


def _unwrapped(found: Any) -> Any:
    """What a `functools.partial` is of; anything else as it is."""
    while isinstance(found, functools.partial):
        found = found.func
    return found


def _named(model: str) -> Any:
    if ":" in model:
        return import_by_name(model, kind="reward model")
    points = entry_points()
    if model not in points:
        raise unknown_name("reward model", model, points, where="a name, module:Class, or file.py:Class")
    try:
        return points[model].load()
    except ImportError as error:
        raise UserError(f"The reward model does not import: {error}", where=model) from error


def _made(kind: Any, model: str, where: str, kwargs: dict[str, Any]) -> RewardModel:
    signature = inspect.signature(kind)
    try:
        signature.bind(**kwargs)
    except TypeError as error:
        takes = ", ".join(signature.parameters) or "nothing"
        raise UserError(
            f"The arguments of {model} do not fit: {error}.", where=where, fix=f"it takes: {takes}"
        ) from error
    try:
        return _checked(kind(**kwargs), model, where)
    except UserError:
        raise
    except Exception as error:  # the user's own program may raise anything
        raise UserError(f"{model} cannot be made: {type(error).__name__}: {error}", where=where) from error


def _checked(found: Any, model: str, where: str) -> RewardModel:
    if not isinstance(found, RewardModel):
        raise UserError(f"{model} has no method score(prompts, completions, **columns).", where=where)
    return found


def _spec(name: str, settings: Any, key: str) -> RewardSpec:
    if isinstance(settings, str):
        settings = {"model": settings}
    if not isinstance(settings, dict):
        raise UserError("A reward is a mapping of settings.", where=f"{key}: {name}")
    valid = [each.name for each in dataclasses.fields(RewardSpec) if each.name != "name"]
    for setting in settings:
        if setting not in valid:
            raise unknown_name("setting", setting, valid, where=f"{key}: {name}")
    own = {"model": name, **{setting: value for setting, value in settings.items() if value is not None}}
    for setting in ("weight", "clip", "timeout", "limit", "sign"):
        try:
            own |= {setting: float(own[setting])} if setting in own else {}
        except (TypeError, ValueError):
            raise UserError(f"{setting} is {own[setting]!r}, not a number.", where=f"{key}: {name}") from None
    if not isinstance(own["model"], str) or not isinstance(own.get("kwargs", {}), dict):
        raise UserError("model is a name, and kwargs is a mapping.", where=f"{key}: {name}")
    if "normalise" in own and not isinstance(own["normalise"], str):
        fixed = own["normalise"]
        fits = isinstance(fixed, (list, tuple)) and len(fixed) == 2
        if not fits or not all(isinstance(each, (int, float)) for each in fixed):
            raise UserError("Fixed normalisation is [mean, deviation].", where=f"{key}: {name}")
        own["normalise"] = tuple(map(float, fixed))
    if isinstance(own.get("rows"), (list, str)):
        own["rows"] = (own["rows"],) if isinstance(own["rows"], str) else tuple(own["rows"])
    return RewardSpec(name=name, **own)
