"""Suites: which probes and attacks, on how many rows, with which budgets. A YAML file each; a user's own is one too.

about: what it is for
tokens: 24                                   new tokens of an answer; the recipe's where none is named
rows: {forget: 100, retain: 100}             at most so many of each set
probes: {paraphrase: {rows: 24, variants: 2}, sampling: {draws: 8, temperature: 1.0, seeds: [0, 1]}}
attacks: {relearn: {rows: 32, steps: [5, 20]}}
multiple_choice: {mmlu: cais/mmlu:all@test}  questions with choices, by log-probability: the metric utility.mmlu
open_answers: {wmdp_bio: …}                  the same sources without the choices: utility.wmdp_bio.open
sources: {forget: …}                         sets, where neither recipe nor command line names one
chat: true                                   prompts of plain text are asked as messages
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align_unlearn.audit.attacks import ATTACKS
from align_unlearn.audit.benchmarks import BENCHMARKS
from align_unlearn.audit.probes import PROBES
from align_unlearn.config import read_recipe
from align_unlearn.errors import UserError, unknown_name

SUITES = Path(__file__).parent / "suites"
ASKING = ("rows", "variants", "draws", "temperature", "seeds")
"""What a suite may say of every probe; the rest goes to the probe."""
GROUPS = ("forget", "neighbours", "retain", "holdout", "benchmarks")


@dataclass(frozen=True)
class Suite:
    """What an audit asks.

    Attributes:
        name: of the file.
        about: what it is for.
        tokens: new tokens of an answer; none for the recipe's.
        rows: at most so many of each group.
        probes: settings by name.
        attacks: settings by name.
        benchmarks: what each takes, by name.
        sources: sets by group, where none is named otherwise.
        chat: ask prompts of plain text as messages.
    """

    name: str
    about: str = ""
    tokens: int | None = None
    rows: Mapping[str, int] = field(default_factory=dict)
    probes: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    attacks: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    benchmarks: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    chat: bool = False

    def described(self) -> dict[str, Any]:
        """As `audit.json` holds it."""
        return {key: dict(value) if isinstance(value, Mapping) else value for key, value in vars(self).items()}


def suite_names() -> list[str]:
    """The shipped suites."""
    return sorted(file.stem for file in SUITES.glob("*.yaml"))


def read_suite(name: str) -> Suite:
    """A shipped suite by name, or a YAML file of one's own.

    Raises:
        UserError: there is none, or it names a key, probe, attack or option that there is not.
    """
    own = name.endswith((".yaml", ".yml"))
    if not own and name not in suite_names():
        raise unknown_name(
            "suite",
            name,
            suite_names(),
            where="--suite",
        )
    place = Path(name) if own else SUITES / f"{name}.yaml"
    given = read_recipe(place)
    keys = [key for key in Suite.__dataclass_fields__ if key != "name"]
    for key in given:
        if key not in keys:
            raise unknown_name("key", str(key), keys, where=str(place))
    suite = Suite(name=place.stem, **{key: value for key, value in given.items() if value is not None})
    _check_counts(suite, place)
    for probe, options in _mappings(suite.probes, "probes", place).items():
        if probe not in PROBES:
            raise unknown_name("probe", probe, PROBES, where=str(place))
        _check_options(options, [*ASKING, *keywords(PROBES[probe].ask)], f"{place}: probes: {probe}")
    for attack, options in _mappings(suite.attacks, "attacks", place).items():
        if attack not in ATTACKS:
            raise unknown_name("attack", attack, ATTACKS, where=str(place))
        _check_options(options, ["rows", *keywords(ATTACKS[attack])], f"{place}: attacks: {attack}")
    return suite


def keywords(function: Callable[..., Any]) -> list[str]:
    """The names of a function's keyword-only parameters."""
    parameters = inspect.signature(function).parameters.values()
    return [each.name for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY]


def _check_counts(suite: Suite, place: Path) -> None:
    rows = _mapping(suite.rows, "rows", place)
    for group, count in rows.items():
        if group not in GROUPS:
            raise unknown_name("group", str(group), GROUPS, where=f"{place}: rows")
        _positive(count, f"{place}: rows: {group}")
    if suite.tokens is not None:
        _positive(suite.tokens, f"{place}: tokens")
    _mapping(suite.sources, "sources", place)
    for name in _mappings(suite.benchmarks, "benchmarks", place):
        if name not in BENCHMARKS:
            raise unknown_name("benchmark", name, BENCHMARKS, where=str(place))
    for group in suite.sources:
        if group not in GROUPS:
            raise unknown_name("group", str(group), GROUPS, where=f"{place}: sources")


def _check_options(options: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    for key in options:
        if key not in known:
            raise unknown_name("option", str(key), known, where=where)
    for key in ("rows", "variants", "draws"):
        if key in options:
            _positive(options[key], f"{where}: {key}")


def _positive(value: Any, where: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{value!r} is not a number of at least 1.", where=where)


def _mappings(value: Any, key: str, place: Path) -> dict[str, dict[str, Any]]:
    entries = _mapping(value, key, place)
    for name, options in entries.items():
        if options is not None and not isinstance(options, dict):
            raise UserError(f"The settings of {name} are a mapping, such as {{rows: 24}}.", where=f"{place}: {key}")
    return {str(name): options or {} for name, options in entries.items()}


def _mapping(value: Any, key: str, place: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"`{key}` is a mapping.", where=str(place))
    return value
