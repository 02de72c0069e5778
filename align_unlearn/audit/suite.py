"""Suites: which probes and attacks, on how many rows, with which budgets. A YAML file each; a user's own is one too.

about: what it is for
tokens: 24                                   new tokens of an answer; the recipe's where none is named
rows: {forget: 100, retain: 100}             at most so many of each set
probes: {paraphrase: {rows: 24, variants: 2}, sampling: {draws: 8, temperature: 1.0, seeds: [0, 1]}}
attacks: {relearn: {rows: 32, steps: [5, 20]}}
benchmarks: {multiple_choice: {mmlu: …}}     what each takes is said in its file
sources: {forget: …}                         sets, where neither recipe nor command line names one; of a set in
                                             another's format {source: …, columns: {Goal: prompt}, where: {label: safe}}
chat: true                                   prompts of plain text are asked as messages
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from align_unlearn.audit.attacks import ATTACKS
from align_unlearn.audit.benchmarks import BENCHMARKS
from align_unlearn.audit.options import check_options, keywords
from align_unlearn.audit.probes import PROBES
from align_unlearn.config import read_recipe
from align_unlearn.errors import UserError, unknown_name

SUITES = Path(__file__).parent / "suites"
ASKING: dict[str, Any] = {
    "rows": int, "variants": int, "draws": int, "temperature": float, "seeds": Sequence[int]
}  # fmt: skip
"""What a suite may say of every probe; the rest goes to the probe."""
SETS = ("forget", "neighbours", "retain", "holdout")
GROUPS = (*SETS, "benchmarks")
SOURCE: dict[str, Any] = {"source": str, "columns": Mapping[str, str], "where": Mapping[str, str]}
"""What a suite may say of a set: where it is, new names of columns, and values that rows must have in them."""


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
    sources: Mapping[str, Any] = field(default_factory=dict)
    chat: bool = False

    @property
    def of_requests(self) -> bool:
        """Whether it asks about what was to be forgotten at all; a suite of benchmarks alone does not."""
        return not self.benchmarks or bool(self.probes or self.attacks)

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
    if own and place.stem in suite_names():
        raise UserError(f"'{place.stem}' is a shipped suite, beside whose audit yours would be written.", where=name,
                        fix="another file name")  # fmt: skip
    given = read_recipe(place)
    keys = [key for key in Suite.__dataclass_fields__ if key != "name"]
    for key in given:
        if key not in keys:
            raise unknown_name("key", str(key), keys, where=str(place))
    suite = _normalised(
        Suite(name=place.stem, **{key: value for key, value in given.items() if value is not None}), place
    )
    _check_counts(suite, place)
    for probe, options in suite.probes.items():
        if probe not in PROBES:
            raise unknown_name("probe", probe, PROBES, where=str(place))
        known = ASKING | keywords(PROBES[probe].ask)
        check_options(options, known, f"{place}: probes: {probe}")
        _check_positive(options, f"{place}: probes: {probe}")
    for attack, options in suite.attacks.items():
        if attack not in ATTACKS:
            raise unknown_name("attack", attack, ATTACKS, where=str(place))
        check_options(options, {"rows": int} | keywords(ATTACKS[attack]), f"{place}: attacks: {attack}")
        _check_positive(options, f"{place}: attacks: {attack}")
    return suite


def _normalised(suite: Suite, place: Path) -> Suite:
    """The suite with `{}` where a probe, an attack or a benchmark is named without settings."""
    return replace(
        suite,
        probes=_mappings(suite.probes, "probes", place),
        attacks=_mappings(suite.attacks, "attacks", place),
        benchmarks=_mappings(suite.benchmarks, "benchmarks", place),
    )


def _check_positive(options: Mapping[str, Any], where: str) -> None:
    for key in ("rows", "variants", "draws"):
        if key in options:
            _positive(options[key], f"{where}: {key}")


def _check_counts(suite: Suite, place: Path) -> None:
    rows = _mapping(suite.rows, "rows", place)
    for group, count in rows.items():
        if group not in GROUPS:
            raise unknown_name("group", str(group), GROUPS, where=f"{place}: rows")
        _positive(count, f"{place}: rows: {group}")
    if suite.tokens is not None:
        _positive(suite.tokens, f"{place}: tokens")
    for name in suite.benchmarks:
        if name not in BENCHMARKS:
            raise unknown_name("benchmark", name, BENCHMARKS, where=str(place))
    for group, source in _mapping(suite.sources, "sources", place).items():
        if group not in SETS:
            raise unknown_name("group", str(group), SETS, where=f"{place}: sources")
        if isinstance(source, dict):
            check_options(source, SOURCE, f"{place}: sources: {group}")
        if not isinstance(source, str) and not (isinstance(source, dict) and "source" in source):
            raise UserError("A set is a source, or a mapping with one.", where=f"{place}: sources: {group}",
                            fix="{source: NAME, columns: {Goal: prompt}, where: {label: safe}}")  # fmt: skip


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
