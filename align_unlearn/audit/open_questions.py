"""What an audit does not answer, in words for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from align_unlearn.audit.answers import Record
from align_unlearn.audit.attacks import ATTACKS
from align_unlearn.audit.probes import PROBES
from align_unlearn.audit.subjects import Subject
from align_unlearn.audit.suite import Suite


def open_questions(
    subjects: Mapping[str, Subject],
    sets: Mapping[str, Any],
    suite: Suite,
    manifest: Mapping[str, Any],
    records: Sequence[Record],
) -> list[str]:
    """The questions that stay open after this suite, these sets, these models and what they said."""
    own = [each for each in records if each["model"] == "candidate" and "failed" not in each]
    asked = {each.get("attack", each["probe"]) for each in own}
    questions = []
    for what, table, named in (("Ways of asking", PROBES, suite.probes), ("Attacks", ATTACKS, suite.attacks)):
        if untried := [name for name in table if name not in named]:
            questions.append(f"{what} that were not tried: {', '.join(untried)}.")
        if unfit := [name for name in named if name not in asked]:
            questions.append(f"{what} that the suite names but that do not apply to these rows: {', '.join(unfit)}.")
    if "control" not in subjects:
        questions.append(
            "There is no model that never saw the forget set to compare with, so it is not known what such a model "
            "would have said, nor how soon it would have learnt the rows anew."
        )
    if "holdout" not in sets:
        questions.append("No rows were given that no model has seen: membership was not inferred.")
    if manifest.get("retain") == "none":
        questions.append("The run had no retain term: nothing held the model near the original.")
    if "retain" not in sets:
        questions.append("No retain set was audited: what the run cost elsewhere was not measured.")
    if "neighbours" not in sets:
        questions.append("No benign look-alikes were audited: over-refusal was not measured.")
    questions.append("No audit shows that something is gone: only that it was not recovered in the ways stated here.")
    return questions
