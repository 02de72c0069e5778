"""What each way of shipping keeps of the forgetting, on runs of ours. Writes `results/survival/NAME/`.

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

import torch

from align_unlearn.audit.sets import audited_sets
from align_unlearn.audit.subjects import open_subjects, read_settings
from align_unlearn.export.survival import survival
from align_unlearn.export.survive import DEFAULT, Export, survive, table
from align_unlearn.files import write_json
from align_unlearn.modeling.plain import plain_copy
from align_unlearn.modeling.round_trip import requantise
from align_unlearn.report.survival import kept_bars, write_survival_page

RESULTS = Path(__file__).parent / "results/survival"
MORE = (Export("original16", "nf4", "nearest"), Export("original16", "q4_0", "nearest"))
"""Asked as well where the run's base was quantised, so that it has 16-bit weights of its own."""


def main(name: str, run: str, *through: str) -> None:
    """Measures a run and writes table and page."""
    held = json.loads((Path(run) / "manifest.json").read_text("utf-8"))["base"]["precision"]
    exports = [*DEFAULT, *(MORE if held.startswith(("nf4", "fp4")) else ())]
    found = json.loads(survive(run, exports).read_text("utf-8"))
    order = [each.name for each in exports]
    found["exports"].sort(key=lambda each: order.index(each["name"]) if each["name"] in order else len(order))
    found["exports"] += [trained_through(run, other) for other in through]
    target = RESULTS / name
    write_json(target / "survival.json", found)
    write_survival_page(target)
    (target / "kept.svg").write_text(kept_bars(found["exports"]), "utf-8")
    print(table(found["exports"]))


def trained_through(run: str, other: str) -> dict[str, Any]:
    """What a run that was trained through a quantiser has forgotten, as it is shipped, beside the run that was not."""
    began = time.monotonic()
    job, precision = read_settings(run)[0], str(read_settings(other)[0].survive)
    subjects = open_subjects(run)
    trained = open_subjects(other)["candidate"]
    model = plain_copy(trained.model, torch.float32)
    requantise(model, precision)
    export = replace(trained, name="control", model=model, sha256=f"{trained.sha256} as {precision}")
    kept = survival(subjects, export, audited_sets(job, trained.tokenizer), max_new_tokens=job.audit_tokens)
    return {"mode": "dequantised", "precision": precision, "rounding": "nearest",
             "name": f"trained through {precision} → {precision}, nearest", **kept.described(),
             "seconds": time.monotonic() - began,
             "cpu_seconds_to_make": None, "calibrated_on_audited_rows": False, "layers": {}}  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
