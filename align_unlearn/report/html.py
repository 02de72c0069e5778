"""`write_report`: an audit's folder → `report.html`, one file without scripts, fonts or pictures from elsewhere.

Model output is untrusted text: the template escapes everything that is not a plot of ours, and what the base said to
prompts that are to be forgotten is folded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from align_unlearn.errors import UserError
from align_unlearn.files import read_json_lines, write_text
from align_unlearn.report.plots import GROUPS, MODELS, drift_dots, overlap_dots, verdict_bars

LONGEST = 1200
"""Characters of an answer that the page shows."""


def write_report(folder: str | Path, *, withhold: bool = False) -> Path:
    """Writes `report.html` beside `audit.json` and returns its path.

    Args:
        folder: a run, an export, or the audit folder in it.
        withhold: leave out what was leaked, so that the page can be shared.

    Raises:
        UserError: there is no audit there.
    """
    place = Path(folder)
    place = place if (place / "audit.json").is_file() else place / "audit"
    if not (place / "audit.json").is_file():
        raise UserError("There is no audit here.", where=str(folder), fix=f"align-unlearn audit {folder}")
    summary = json.loads((place / "audit.json").read_text("utf-8"))
    if not (place / "records.jsonl").is_file():
        raise UserError("The audit's records.jsonl is not here.", where=str(place), fix="audit the run again")
    records = read_json_lines(place / "records.jsonl")
    page = render(summary, [withheld(record) for record in records] if withhold else records)
    write_text(place / "report.html", page)
    return place / "report.html"


def render(summary: dict[str, Any], records: list[dict[str, Any]]) -> str:
    """The page of an audit."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["figure"] = figure
    template = environment.get_template("template.html.jinja")
    plots = [("What was said", verdict_bars(records))]
    if any(record["probe"] == "likelihood" and record["group"] == "retain" for record in records):
        plots.append(("Drift on retained text", drift_dots(records)))
    if any("verbatim_run" in record for record in records):
        plots.append(("Verbatim overlap", overlap_dots(records)))
    return template.render(audit=summary, plots=plots, groups=side_by_side(records), names=GROUPS, models=MODELS)


def withheld(record: dict[str, Any]) -> dict[str, Any]:
    """The record without what must not be said: the text itself, and all that was said to it but refusals."""
    if record["group"] != "forget" or record["probe"] != "answers":
        return record
    said = record["completion"] if record["verdict"] == "refuse" else "(withheld)"
    return {**record, "completion": said, "reference": record["reference"] and "(withheld)"}


def side_by_side(records: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """For each group the rows with every model's answer: `{"prompt", "reference", "answers": {model: record}}`."""
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for record in records:
        if record["probe"] == "answers":
            rows = groups.setdefault(record["group"], {})
            row = rows.setdefault(
                record["id"],
                {
                    "prompt": record["prompt"][:LONGEST],
                    "reference": (record["reference"] or "")[:LONGEST],
                    "answers": {},
                },
            )
            folded = record["group"] == "forget" and record["verdict"] != "refuse"
            said = record["completion"][:LONGEST]
            row["answers"][record["model"]] = {**record, "completion": said, "folded": folded}
    return {group: list(rows.values()) for group, rows in groups.items()}


def figure(value: float | None) -> str:
    """A figure as the tables show it: shares and small numbers with three digits, none as a dash."""
    if value is None:
        return "–"
    return f"{value:.3g}" if abs(value) >= 0.0005 or value == 0 else f"{value:.1e}"
