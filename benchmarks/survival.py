"""What each way of shipping keeps of the forgetting, on runs of ours. Writes `results/survival/NAME/`.

    python benchmarks/survival.py NAME RUN [survive's options]

Answers of exports measured before are kept, so that a killed benchmark goes on where it was.
"""

import json
import shutil
import sys
from pathlib import Path

from align_unlearn.export.survive import DEFAULT, Export, survive, table
from align_unlearn.files import write_json
from align_unlearn.report.survival import kept_bars, write_survival_page

RESULTS = Path(__file__).parent / "results/survival"
MORE = (Export("original16", "nf4", "nearest"), Export("original16", "q4_0", "nearest"),
        Export("original16", "q4_0", "tuned"))  # fmt: skip
"""Asked as well where the run's base was quantised, so that it has 16-bit weights of its own."""


def main(name: str, run: str) -> None:
    """Measures a run and writes table and page."""
    held = json.loads((Path(run) / "manifest.json").read_text("utf-8"))["base"]["precision"]
    exports = [*DEFAULT, *(MORE if held.startswith(("nf4", "fp4")) else ())]
    file = survive(run, exports)
    target = RESULTS / name
    target.mkdir(parents=True, exist_ok=True)
    write_json(target / "survival.json", json.loads(file.read_text("utf-8")))
    shutil.copy(write_survival_page(file.parent), target / "survival.html")
    (target / "kept.svg").write_text(kept_bars(json.loads(file.read_text("utf-8"))["exports"]), "utf-8")
    print(table(json.loads(file.read_text("utf-8"))["exports"]))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
