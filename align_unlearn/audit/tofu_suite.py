"""`evaluate_tofu`: a run's base, its result and a retain-only control, each asked all of TOFU, as one table.

Rows are kept in the user's cache under who was asked and what, so that a base or a control is asked once however many
runs are compared with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from align_unlearn.audit.subjects import Subject, open_subjects, read_settings
from align_unlearn.audit.tofu import TofuRow, tofu_figures
from align_unlearn.audit.tofu_probe import Question, drift, evaluate, read_questions
from align_unlearn.config import Job
from align_unlearn.errors import UserError
from align_unlearn.files import read_json_lines, sha256_of, write_json, write_json_lines
from align_unlearn.modeling.embedded import cache_folder
from align_unlearn.run_dir import SCHEMA_VERSION, versions


@dataclass(frozen=True)
class TofuEvaluation:
    """What was found, and where it was written."""

    summary: dict[str, Any]
    file: Path

    def table(self) -> str:
        """The figures as lines of text, a column a model."""
        models = self.summary["models"]
        lines = [f"{'':<28}" + "".join(f"{name:>12}" for name in models)]
        for figure in next(iter(models.values())):
            cells = [models[name].get(figure) for name in models]
            lines.append(f"{figure:<28}" + "".join(f"{_say(each):>12}" for each in cells))
        return "\n".join(lines)


def evaluate_tofu(
    target: str | Path, *, trust_remote_code: bool = False, say: Callable[[str], None] = print
) -> TofuEvaluation:
    """Asks all of TOFU of a run (or an exported folder), of its base and of its control, and writes `audit/tofu.json`.

    The sets are those of the recipe: `audit_forget` (or `forget_dataset`), `audit_retain` (or `retain_dataset`),
    `audit_real_authors`, `audit_world_facts`; the retain-only model is `audit_control`. Without one there is no forget
    quality.

    Raises:
        UserError: the target is neither, a set is not named, or a row has no wrong answers.
    """
    job, _ = read_settings(target)
    sets = tofu_sets(job)
    subjects = open_subjects(target, job.audit_control, trust_remote_code=trust_remote_code)
    evaluations = {}
    for name, subject in subjects.items():
        say(f"asking {name}: {subject.path}")
        evaluations[name] = kept_evaluation(subject, sets, job.audit_tokens)
    models = {name: tofu_figures(each, evaluations.get("control")) for name, each in evaluations.items()}
    for name, subject in subjects.items():
        kl = drift(subject, subjects["base"], sets["retain"])
        models[name]["retain.kl"] = sum(kl) / len(kl)
    summary = {
        "schema_version": SCHEMA_VERSION,
        "subjects": {name: subject.described() for name, subject in subjects.items()},
        "rows": {name: len(questions) for name, questions in sets.items()},
        "models": models,
        "libraries": versions(),
    }
    file = Path(target) / "audit/tofu.json"
    write_json(file, summary)
    return TofuEvaluation(summary, file)


def tofu_sets(job: Job) -> dict[str, list[Question]]:
    """The questions of a job, by set.

    Raises:
        UserError: a set is not named, or cannot be read.
    """
    sources = {
        "forget": job.audit_forget or job.forget_dataset,
        "retain": job.audit_retain or job.retain_dataset,
        "real_authors": job.audit_real_authors,
        "world_facts": job.audit_world_facts,
    }
    for name, source in sources.items():
        if not source:
            raise UserError(f"TOFU's set '{name}' is not named.", where=f"audit_{name}", fix="see recipes/tofu.yaml")
    return {name: read_questions(str(source))[: job.audit_limit] for name, source in sources.items()}


def kept_evaluation(
    subject: Subject, sets: Mapping[str, Sequence[Question]], max_new_tokens: int
) -> dict[str, list[TofuRow]]:
    """The whole table of a subject's rows, from the cache where it was asked before."""
    asked = {name: [[each.example.prompt, each.answers] for each in questions] for name, questions in sets.items()}
    file = cache_folder() / "tofu" / f"{sha256_of([subject.sha256, asked, max_new_tokens])}.jsonl"
    if not file.is_file():
        found = evaluate(subject, sets, max_new_tokens=max_new_tokens)
        write_json_lines(file, [{"set": name, **asdict(row)} for name, rows in found.items() for row in rows])
    evaluation: dict[str, list[TofuRow]] = {name: [] for name in sets}
    for row in read_json_lines(file):
        evaluation[row.pop("set")].append(TofuRow(**{**row, "perturbed_losses": tuple(row["perturbed_losses"])}))
    return evaluation


def _say(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1e}" if 0 < value < 0.001 else f"{value:.3f}"
