"""What an online run did, from its audit: the reward on held-out prompts before and after, verdicts, drift, cost.

    align-unlearn audit runs/harmless-start                      (what the run started from, if it did)
    python benchmarks/online.py runs/ppo_harmless ppo            (after make demo-ppo)

Scores the audit's answers (greedy, held-out prompts) with the run's own rewards; writes `results/online/NAME.json`,
the learning curves, settings and log. No text that anybody said is copied.
"""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from align_unlearn.audit.statistics import bootstrap_interval
from align_unlearn.data.examples import read_examples
from align_unlearn.files import read_json_lines, write_json
from align_unlearn.modeling.tokenizer import load_tokenizer
from align_unlearn.report.curves import write_curves
from align_unlearn.rewards.guard import scored
from align_unlearn.rewards.load import make_reward, read_specs, standing_alone
from align_unlearn.rewards.protocol import as_messages

RESULTS = Path(__file__).parent / "results/online"
GROUPS = {"forget": "forget", "neighbours": "neighbour", "retain": "retain"}
"""Rows of an audit by the kind of prompt that they are."""
WATCHED = ("verdict/", "reward/", "heldout/", "drift/mean", "explained_variance")
"""What the JSON keeps of each batch of rollouts."""


def rewards_on_answers(run: Path) -> list[dict[str, Any]]:
    """Mean score of each reward, and mean of each cost, before and after, by group, with 95% intervals over rows."""
    recipe = yaml.safe_load((run / "recipe.yaml").read_text("utf-8"))
    records = [each for each in read_json_lines(run / "audit/records.jsonl") if each["probe"] == "answers"]
    plain = isinstance(
        read_examples(recipe["forget_dataset"], load_tokenizer(recipe["model_name_or_path"]))[0].prompt, str
    )
    found = []
    costs = [replace(each, sign=-each.sign) for each in read_specs(recipe.get("costs"), "costs")]  # minus the score
    for spec in [*read_specs(recipe.get("rewards")), *costs]:
        model = make_reward(standing_alone(spec, recipe["model_name_or_path"]))
        for group, kind in GROUPS.items():
            if spec.rows and kind not in spec.rows:
                continue
            sides = {}
            for side in ("base", "candidate"):
                rows = [each for each in records if (each["group"], each["model"]) == (group, side)]
                if rows:
                    asked = [as_messages(each["prompt"]) for each in rows]
                    columns = {"kind": [kind] * len(rows), "plain": [plain] * len(rows)}
                    columns["reference"] = [each["reference"] for each in rows]
                    sides[side] = scored(spec, model, asked, [each["completion"] for each in rows], columns)
            if sides:
                both = [pair for pair in zip(*sides.values(), strict=True) if None not in pair]
                kept = dict(zip(sides, map(list, zip(*both, strict=True)), strict=True))
                limit = {} if spec.limit is None else {"limit": spec.limit}
                found.append({"reward": spec.name, "group": group, **limit, **_summary(kept)})
    return found


def _summary(sides: dict[str, list[float]]) -> dict[str, Any]:
    told: dict[str, Any] = {"n": len(sides["base"])}
    for name, values in {**sides, "change": [b - a for a, b in zip(*sides.values(), strict=True)]}.items():
        low, high = bootstrap_interval(values)
        told[name] = {"mean": sum(values) / len(values), "low": low, "high": high}
    return told


def rises(log: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What was learned: by figure, its mean over a batch in the first and the last quarter of those logged, with
    intervals.

    The figures are the costs of a run that has some: its `reward` is divided by what grows with their weights and would
    rise by itself. Else TRL's `reward`, of all rows and by kind of prompt where there are several (a reward that is
    normalised as it runs is on another scale in the first batches).
    """
    lines = [line for line in log if "reward" in line and "train_runtime" not in line]
    costs = sorted({key for line in lines for key in line if key.startswith("cost/")})
    kinds = [f"reward/{kind}" for kind in GROUPS.values() if any(f"reward/{kind}" in line for line in lines)]
    names = costs or ["reward", *(kinds if len(kinds) > 1 else [])]
    return {name: _quarters([line[name] for line in lines if name in line]) for name in names if lines}


def seconds_a_step(log: list[dict[str, Any]]) -> float:
    """Mean over all steps that were logged, also before a resumption; without what saving takes."""
    took = [line["step_time"] for line in log if "step_time" in line]
    return sum(took) / len(took)


def drift(log: list[dict[str, Any]]) -> float | None:
    """What the drift budget measured last, over four steps, nats a token; none where the retain term is no KL."""
    return next((line["drift/mean"] for line in reversed(log) if "drift/mean" in line), None)


def _quarters(figures: list[float]) -> dict[str, dict[str, float]]:
    quarter = max(1, len(figures) // 4)
    found = {}
    for name, values in (("first", figures[:quarter]), ("last", figures[-quarter:])):
        low, high = bootstrap_interval(values)
        found[name] = {"mean": sum(values) / len(values), "low": low, "high": high}
    return found


def collect(run: Path, name: str) -> Path:
    """Writes what may be shown of an online run."""
    target = RESULTS / f"{name}.json"
    log = read_json_lines(run / "log.jsonl")
    manifest = json.loads((run / "manifest.json").read_text("utf-8"))
    verdicts = [
        {
            "step": line["step"],
            **{key: line[key] for key in line if key.startswith(WATCHED)},
        }
        for line in log
        if "reward/forget" in line
    ]
    recipe = yaml.safe_load((run / "recipe.yaml").read_text("utf-8"))
    start = Path(str(recipe.get("start_from"))) / "audit/audit.json"
    audits = {part: json.loads((run / part / "audit.json").read_text("utf-8")) for part in ("audit", "merged/audit")}
    write_json(
        target,
        {
            "rewards": rewards_on_answers(run),
            "metrics": {part: audit["metrics"] for part, audit in audits.items()},
            "start": json.loads(start.read_text("utf-8"))["metrics"] if start.is_file() else None,
            "max_drift": recipe.get("max_drift"),
            "drift": drift(log),
            "data": manifest["data"],
            "gates": {part: audit["gates"] for part, audit in audits.items()},
            "steps": manifest["steps"],
            "seconds_a_step": seconds_a_step(log),
            "peak_mib": round(manifest["peak_bytes"] / 2**20),
            "stopped_because": manifest["stopped_because"],
            "rises": rises(log),
            "curve": verdicts,
            "libraries": manifest["libraries"],
        },
    )
    for file in ("recipe.yaml", "log.jsonl"):
        shutil.copy(run / file, RESULTS / f"{name}.{file}")
    if curves := write_curves(run):
        shutil.copy(curves, RESULTS / f"{name}.svg")
    return target


if __name__ == "__main__":
    RESULTS.mkdir(parents=True, exist_ok=True)
    print(collect(Path(sys.argv[1]), sys.argv[2]))
