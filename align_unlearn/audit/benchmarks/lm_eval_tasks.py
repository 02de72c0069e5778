"""Any task of lm-eval by name (`pip install align-unlearn[lm-eval]`): `benchmarks: {lm_eval: {tasks: [arc_easy]}}`.

lm-eval loads the data and defines prompt and metric; the models are ours, in the precision in which they are audited.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from align_unlearn.audit.answers import Record
from align_unlearn.audit.benchmarks.benchmark import MODELS, Limits
from align_unlearn.audit.kept import Kept
from align_unlearn.audit.subjects import Subject
from align_unlearn.errors import UserError
from align_unlearn.files import sha256_of

OPTIONS = ("tasks", "num_fewshot", "include_path")


def ask(subjects: Mapping[str, Subject], options: Mapping[str, Any], limits: Limits) -> list[Record]:
    """A record for each task, metric and subject: lm-eval's figure and its standard error.

    Raises:
        UserError: lm-eval is not installed, or has no such task.
    """
    tasks = options.get("tasks")
    if not tasks or not isinstance(tasks, list) or set(options) - set(OPTIONS):
        raise UserError("lm_eval takes tasks, num_fewshot and include_path.", where="benchmarks: lm_eval",
                        fix="lm_eval: {tasks: [arc_easy]}")  # fmt: skip
    records = []
    for who, subject in subjects.items():
        kept = Kept("lm_eval", [subject.sha256, limits.rows])
        key = sha256_of([options, _version()])
        if key not in kept.found:
            kept.add({key: _evaluated(subject, options, limits)})
        records += [
            {"probe": "lm_eval", "group": "utility", "model": who, "id": f"{task} {name}", "set": task, "metric": name,
             "figure": figure, "error": error, "n": n}
            for task, name, figure, error, n in kept.found[key]
        ]  # fmt: skip
    return records


def metrics(records: Sequence[Record]) -> list[dict[str, Any]]:
    """`utility.TASK.METRIC`; the interval is two standard errors to either side."""
    own = [each for each in records if each["probe"] == "lm_eval"]
    found = []
    for task, name in dict.fromkeys((each["set"], each["metric"]) for each in own):
        figures = {each["model"]: each for each in own if (each["set"], each["metric"]) == (task, name)}
        candidate = figures["candidate"]
        spread = 1.96 * candidate["error"] if candidate["error"] is not None else None
        found.append(
            {"name": f"utility.{task}.{name}", "group": "utility", "better": "higher",
             **{who: figures[who]["figure"] if who in figures else None for who in MODELS},
             "low": None if spread is None else candidate["figure"] - spread,
             "high": None if spread is None else candidate["figure"] + spread,
             "n": candidate["n"], "budget": "lm-eval"}
        )  # fmt: skip
    return found


def names(options: Mapping[str, Any]) -> list[str]:
    """What lm-eval calls a task's metrics is not known before: accuracy, mostly."""
    return [f"utility.{task}.{name}" for task in options.get("tasks") or [] for name in ("acc", "acc_norm")]


def _evaluated(subject: Subject, options: Mapping[str, Any], limits: Limits) -> list[list[Any]]:
    lm_eval, hf, manager = _library()
    with subject.speaking() as model:
        try:
            found = lm_eval.simple_evaluate(
                model=hf(pretrained=model, tokenizer=subject.tokenizer),
                tasks=list(options["tasks"]),
                num_fewshot=options.get("num_fewshot"),
                limit=limits.rows,
                task_manager=manager(include_path=options.get("include_path")),
                bootstrap_iters=100,  # 0 would leave out the standard errors of means too
                log_samples=False,
            )
        except (KeyError, ValueError) as error:
            raise UserError(f"lm-eval could not run this: {error}", where="benchmarks: lm_eval") from error
    rows = []
    for task, figures in found["results"].items():
        for name, value in figures.items():
            metric, _, rest = name.partition(",")
            if isinstance(value, float) and math.isfinite(value) and rest and not metric.endswith("_stderr"):
                deviation = figures.get(f"{metric}_stderr,{rest}")
                n = found["n-samples"][task]["effective"]
                rows.append([task, metric, value, deviation if isinstance(deviation, float) else None, n])
    return rows


def _library() -> tuple[Any, Any, Any]:
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            "lm-eval is not installed.", where="benchmarks: lm_eval", fix="pip install 'align-unlearn[lm-eval]'"
        ) from error
    return lm_eval, HFLM, TaskManager


def _version() -> str:
    return str(getattr(_library()[0], "__version__", ""))
