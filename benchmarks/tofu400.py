"""The comparison's records, read: the rule that picks, the figures, the table and the plot.

python benchmarks/tofu400.py writes benchmarks/results/tofu400 anew from the records under runs/tofu400.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from scipy import stats

from align_unlearn.audit.tofu import TofuRow, forget_quality, tofu_figures
from align_unlearn.files import write_json, write_json_lines, write_text

HERE = Path(__file__).parent
ROOT = HERE.parent
RUNS = ROOT / "runs/tofu400"
RESULTS = HERE / "results/tofu400"
PLAN: dict[str, Any] = yaml.safe_load((HERE / "compare_tofu.yaml").read_text("utf-8"))
KEEPS = 0.95
"""Share of the taught model's probability of the answers to be kept, below which a run is not picked."""
Setting = tuple[str, float, int]
Figures = dict[str, float]


def run_folder(setting: Setting) -> Path:
    """Where a run lies."""
    return RUNS / "grid" / _name(setting)


def record_of(setting: Setting) -> Path:
    """What the rule needs of a run."""
    return RUNS / "records" / f"{_name(setting)}.json"


def whole_record_of(setting: Setting) -> Path:
    """What the table needs of a run."""
    return RUNS / "records" / f"{_name(setting)}.whole.json"


def _name(setting: Setting) -> str:
    objective, learning_rate, seed = setting
    return f"{objective}-{learning_rate:g}-{seed}"


def read_record(path: Path) -> dict[str, Any]:
    """A record."""
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


def rows_of(record: list[dict[str, Any]]) -> list[TofuRow]:
    """Rows from a record."""
    unmeasured = {"rouge_recall": math.nan}
    return [TofuRow(**{**unmeasured, **row, "perturbed_losses": tuple(row["perturbed_losses"])}) for row in record]


def score(setting: Setting) -> tuple[float, float]:
    """(share of the probability that is kept, likeness to what was never taught): all that the rule looks at."""
    record = read_record(record_of(setting))
    if "failed" in record:
        return 0.0, 0.0
    kept = record["retain_probability"]
    never = rows_of(read_record(RUNS / "full.json")["sets"]["never_taught"])
    likeness = forget_quality({"forget": rows_of(record["forget"])}, {"forget": never})
    return fmean(kept["candidate"]) / fmean(kept["base"]), likeness


def preference(setting: Setting) -> tuple[bool, float]:
    """What the rule maximises: first that enough is kept, then likeness (or, where it is not, how much is kept)."""
    kept, likeness = score(setting)
    return kept >= KEEPS, likeness if kept >= KEEPS else kept


def pick(objective: str) -> Setting:
    """The setting that the rule picks for an objective."""
    first = PLAN["seeds"][0]
    return max(((objective, rate, first) for rate in PLAN["learning_rates"]), key=preference)


def picked() -> list[Setting]:
    """The picked settings, best first by the same rule."""
    return sorted(map(pick, PLAN["objectives"]), key=preference, reverse=True)


def seeds_of(setting: Setting) -> list[Setting]:
    """The setting with every seed that it was run with."""
    found = [(setting[0], setting[1], seed) for seed in PLAN["seeds"]]
    return [each for each in found if whole_record_of(each).is_file()]


def figures(setting: Setting) -> Figures:
    """What the table says of one run."""
    record, whole = read_record(record_of(setting)), read_record(whole_record_of(setting))
    return evaluation_figures(whole["sets"]) | {
        "kl": fmean(record["drift"]),
        "seconds": record["seconds"],
        "peak_mib": record["peak_mib"],
    }


def evaluation_figures(sets: dict[str, Any]) -> Figures:
    """The figures that come from a model's rows alone, against the retain-only model."""
    retained = read_record(RUNS / "retain_only.json")["sets"]
    evaluation, control = ({name: rows_of(rows) for name, rows in each.items()} for each in (sets, retained))
    return tofu_figures(evaluation, control)


def results() -> dict[str, Any]:
    """All that is committed: figures of every picked run by seed, and what the rule saw of the whole grid."""
    taught = {name: evaluation_figures(read_record(RUNS / f"{name}.json")["sets"]) for name in ("full", "retain_only")}
    runs = [
        {"objective": each[0], "learning_rate": each[1], "seed": each[2], "kept": score(each)[0], **figures(each)}
        for setting in picked()
        for each in seeds_of(setting)
    ]
    first = PLAN["seeds"][0]
    grid = [_grid_line((name, rate, first)) for name in PLAN["objectives"] for rate in PLAN["learning_rates"]]
    return {"plan": PLAN, "taught": taught, "runs": runs, "grid": grid}


def _grid_line(setting: Setting) -> dict[str, Any]:
    record, (kept, likeness) = read_record(record_of(setting)), score(setting)
    line = {"objective": setting[0], "learning_rate": setting[1], "seed": setting[2]}
    if "failed" in record:
        return line | {"failed": record["failed"]}
    forget = fmean(row.probability for row in rows_of(record["forget"]))
    return line | {
        "kept": kept,
        "likeness": likeness,
        "forget_probability": forget,
        "kl": fmean(record["drift"]),
        "seconds": record["seconds"],
        "peak_mib": record["peak_mib"],
    }


COLUMNS = {
    "forget_quality": "forget quality, p",
    "model_utility": "model utility",
    "forget.probability": "forget probability",
    "retain.probability": "retain probability",
    "forget.rouge_l": "forget ROUGE-L",
    "retain.rouge_l": "retain ROUGE-L",
    "forget.extraction_strength": "forget extraction strength",
    "kl": "KL, nats a token",
    "seconds": "seconds",
    "peak_mib": "peak MiB",
}


def table(found: dict[str, Any]) -> str:
    """The table in Markdown: a line a model, the mean over seeds and their range where there are several."""
    lines = ["| | lr | " + " | ".join(COLUMNS.values()) + " |", "| --- " * (len(COLUMNS) + 2) + "|"]
    for name, row in found["taught"].items():
        title = {"full": "taught everything", "retain_only": "taught what is kept alone"}[name]
        lines.append(
            f"| {title} | | " + " | ".join(_say(key, [row[key]]) if key in row else "" for key in COLUMNS) + " |"
        )
    for name, rate, runs in by_objective(found):
        cells = [_say(key, [run[key] for run in runs]) for key in COLUMNS]
        lines.append(f"| `{name}` | {rate:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def by_objective(found: dict[str, Any]) -> list[tuple[str, float, list[dict[str, Any]]]]:
    """(objective, learning rate, its runs), in the order of the results."""
    names = dict.fromkeys((run["objective"], run["learning_rate"]) for run in found["runs"])
    return [
        (name, rate, [run for run in found["runs"] if (run["objective"], run["learning_rate"]) == (name, rate)])
        for name, rate in names
    ]


def _say(key: str, values: list[float]) -> str:
    def one(value: float) -> str:
        if key in ("seconds", "peak_mib"):
            return f"{value:.0f}"
        return f"{value:.1e}" if key == "forget_quality" and value < 0.001 else f"{value:.3f}"

    middle = stats.gmean(values) if key == "forget_quality" and min(values) > 0 else fmean(values)
    spread = f" ({one(min(values))} to {one(max(values))})" if len(values) > 1 else ""
    return one(float(middle)) + spread


def plot(found: dict[str, Any], to: Path) -> None:
    """Forgetting against utility: right is useful, up is as if never taught; bars are the range over seeds."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "tofu400"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 7))
    floor = 1e-12
    retained = found["taught"]["retain_only"]["model_utility"]
    axes.axhline(0.05, color="#888", linewidth=0.8, linestyle="--")
    axes.axvline(0.95 * retained, color="#888", linewidth=0.8, linestyle="--")
    for name, title in (("full", "taught everything"), ("retain_only", "never taught")):
        each = found["taught"][name]
        axes.plot(each["model_utility"], max(floor, each["forget_quality"]), "k*", markersize=11)
        _label(axes, title, each["model_utility"], max(floor, each["forget_quality"]))
    for name, _, runs in by_objective(found):
        x, y = [run["model_utility"] for run in runs], [max(floor, run["forget_quality"]) for run in runs]
        middle = fmean(x), math.exp(fmean(map(math.log, y)))
        axes.errorbar(
            *middle,
            xerr=[[max(0.0, middle[0] - min(x))], [max(0.0, max(x) - middle[0])]],
            yerr=[[max(0.0, middle[1] - min(y))], [max(0.0, max(y) - middle[1])]],
            fmt="o",
            markersize=6,
            capsize=3,
        )
        _label(axes, name, *middle)
    axes.set_yscale("log")
    lowest = min(run["forget_quality"] for run in [*found["runs"], *found["taught"].values()])
    axes.set_ylim(max(floor, lowest) / 2, 6)
    axes.margins(x=0.1)
    axes.set_xlabel("model utility")
    axes.set_ylabel("forget quality (p that it is as if never taught)")
    axes.set_title("TOFU, 20 authors, 2 forgotten (SmolLM2-135M); dashed: the targets")
    figure.tight_layout()
    figure.savefig(to, metadata={"Date": None})
    plt.close(figure)


def _label(axes: Any, text: str, x: float, y: float) -> None:
    axes.annotate(text, (x, y), textcoords="offset points", xytext=(1, 7), fontsize=9, rotation=50)


def rounded(value: Any) -> Any:
    """The same with five significant digits."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def write_results() -> Path:
    """Writes results.json, table.md, plot.svg and, a line a run, the rows that all of it is made from."""
    found = results()
    places = [RUNS / f"{name}.json" for name in found["taught"]] + sorted((RUNS / "records").glob("*.json"))
    write_json_lines(RESULTS / "rows.jsonl", [{"run": each.stem, **rounded(read_record(each))} for each in places])
    write_json(RESULTS / "results.json", found)
    write_text(RESULTS / "table.md", table(found))
    plot(found, RESULTS / "plot.svg")
    return RESULTS


if __name__ == "__main__":
    print(write_results())
