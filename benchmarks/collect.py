"""Copies what may be shown of a run into `benchmarks/results/NAME`: no records, and pages without leaked text.

python benchmarks/collect.py runs/quickstart quickstart
"""

import json
import shutil
import sys
from pathlib import Path

from align_unlearn.report.html import write_report

RESULTS = Path(__file__).parent / "results"


def collect(run: Path, name: str) -> Path:
    """Copies the run's settings, log and audits; returns the folder."""
    target = RESULTS / name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for file in ("manifest.json", "recipe.yaml", "log.jsonl"):
        shutil.copy(run / file, target / file)
    for source, place in ((run / "audit", target), (run / "merged/audit", target / "merged")):
        if (source / "audit.json").is_file():
            place.mkdir(exist_ok=True)
            page = write_report(source, withhold=True)
            shutil.copy(page, place / "report.html")
            summary = json.loads((source / "audit.json").read_text("utf-8"))
            (place / "audit.json").write_text(json.dumps(summary, indent=2) + "\n", "utf-8")
            write_report(source)
    return target


if __name__ == "__main__":
    print(collect(Path(sys.argv[1]), sys.argv[2]))
