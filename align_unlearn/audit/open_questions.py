"""What an audit does not answer, in words for the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align_unlearn.audit.attacks import ATTACKS
from align_unlearn.audit.probes import PROBES
from align_unlearn.audit.subjects import Subject
from align_unlearn.audit.suite import Suite


def open_questions(
    subjects: Mapping[str, Subject], sets: Mapping[str, Any], suite: Suite, manifest: Mapping[str, Any]
) -> list[str]:
    """The questions that stay open after this suite, these sets and these models."""
    questions = []
    if untried := [name for name in PROBES if name not in suite.probes]:
        questions.append(f"Ways of asking that were not tried: {', '.join(untried)}.")
    if untried := [name for name in ATTACKS if name not in suite.attacks]:
        questions.append(f"Attacks that were not tried: {', '.join(untried)}.")
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
