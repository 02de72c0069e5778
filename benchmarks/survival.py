"""What each way of shipping keeps of the forgetting, on runs of ours. Writes `results/survival/NAME/`, and the README's
figure of what today's merge keeps and what ours keeps.

    python benchmarks/survival.py NAME RUN [RUN_TRAINED_THROUGH_A_QUANTISER …]

A run of the same recipe that was trained through a quantiser is held against the adapter model of RUN, rounded as it
was trained. What was measured before is not measured again, so that a killed benchmark goes on where it was.
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch

from align_unlearn.audit.sets import audited_sets
from align_unlearn.audit.subjects import open_subjects, read_settings
from align_unlearn.export.rounded import default_rounding
from align_unlearn.export.survival import FORGETTING, UTILITY, survival
from align_unlearn.export.survive import EVERY, Export, survive, table
from align_unlearn.files import write_json
from align_unlearn.modeling.plain import plain_copy
from align_unlearn.modeling.round_trip import requantise
from align_unlearn.report.plots import svg_text
from align_unlearn.report.survival import write_survival_page
from align_unlearn.report.survival_plots import kept_bars
from align_unlearn.run_dir import RunDir

RESULTS = Path(__file__).parent / "results/survival"
MORE = tuple(Export("original16", precision, "nearest") for precision in ("bfloat16", "int8", "nf4", "q4_0"))
"""Asked as well where the run's base was quantised, so that it has 16-bit weights of its own."""


def main(name: str, run: str, *through: str) -> None:
    """Measures a run and writes table and page."""
    held = json.loads((Path(run) / "manifest.json").read_text("utf-8"))["base"]["precision"]
    exports = [*EVERY, *(MORE if held.startswith(("nf4", "fp4")) else ())]
    found = json.loads(survive(run, exports).read_text("utf-8"))
    order = [each.name for each in exports]
    found["exports"].sort(key=lambda each: order.index(each["name"]) if each["name"] in order else len(order))
    found["exports"] += [trained_through(run, other) for other in through]
    target = RESULTS / name
    write_json(target / "survival.json", found)
    write_survival_page(target)
    (target / "kept.svg").write_text(kept_bars(found["exports"]), "utf-8")
    (RESULTS / "kept.svg").write_text(today_and_ours(), "utf-8")
    print(table(found["exports"]))


def today_and_ours() -> str:
    """Forgetting and utility that 4-bit merges of every run keep: each value rounded by itself, and as `merge` does."""
    ways = {"today's: each value by itself": "#9aa5b1", "ours, same size": "#2e6da4"}
    runs = {file.parent.name: json.loads(file.read_text("utf-8")) for file in sorted(RESULTS.glob("*/survival.json"))}
    rows = [(name, precision) for name in runs for precision in ("nf4", "q4_0")]
    figure, panels = plt.subplots(1, 2, figsize=(7.6, 0.55 * len(rows) + 1.0), sharey=True)
    for axes, figure_of, title, least in zip(
        panels, ("forgetting_kept", "utility_kept"), ("forgetting kept", "utility kept"), (FORGETTING, UTILITY),
        strict=True,
    ):  # fmt: skip
        for place, (name, precision) in enumerate(reversed(rows)):
            exports = {each["name"]: each for each in runs[name]["exports"]}
            names = [f"dequantised → {precision}, {each}" for each in ("nearest", default_rounding(precision))]
            for own, colour, offset in zip(names, ways.values(), (0.19, -0.19), strict=True):
                kept = exports[own][figure_of]
                axes.barh(place + offset, min(max(kept, 0.0), 1.2), height=0.36, color=colour)
                axes.text(min(max(kept, 0.0), 1.2) + 0.02, place + offset, f"{kept:.0%}", va="center", fontsize=8)
        axes.axvline(least, color="#c0392b", linewidth=0.9, linestyle=":")
        axes.set_xlim(0, 1.42)
        axes.set_xticks([0, 0.5, 1.0])
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set_title(title, fontsize=10, pad=24)
    panels[0].set_yticks(range(len(rows)), [f"{name}, {precision}" for name, precision in reversed(rows)], fontsize=9)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in ways.values()]
    legend = panels[0].legend(handles, list(ways), ncols=2, loc="lower center",
                              frameon=False, fontsize=9, bbox_to_anchor=(1.05, 1.0))  # fmt: skip
    legend.set_in_layout(False)  # it lies beneath both titles
    return svg_text(figure)


def trained_through(run: str, other: str) -> dict[str, Any]:
    """What a run that was trained through a quantiser has forgotten, as it is shipped, beside the run that was not.

    It is a run of its own, which need not say what the other says in place of what is forgotten: its drift there from
    the other's adapter model does not count against it.
    """
    began = time.monotonic()
    job, precision = read_settings(run)[0], str(read_settings(other)[0].survive)
    subjects = open_subjects(run)
    trained = open_subjects(other)["candidate"]
    model = plain_copy(trained.model, torch.float32)
    requantise(model, precision)
    export = replace(trained, name="control", model=model, sha256=f"{trained.sha256} as {precision}")
    kept = survival(subjects, export, audited_sets(job, trained.tokenizer), max_new_tokens=job.audit_tokens)
    survived = replace(kept, kl_forget=0.0).survived
    return {"mode": "dequantised", "precision": precision, "rounding": "nearest",
             "name": f"trained through {precision} → {precision}, nearest", **kept.described(),
             "survived": survived, "run": other, "seed": RunDir.finished(other).manifest().get("seed"),
             "seconds": time.monotonic() - began,
             "cpu_seconds_to_make": None, "calibrated_on_audited_rows": False, "layers": {}}  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
