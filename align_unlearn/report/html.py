"""`write_report`: an audit's folder → `report.html`, one file without scripts, fonts or pictures from elsewhere.

Model output is untrusted text: it passes through `visible`, the template escapes everything that is not a plot of ours,
and what was said to prompts that are to be forgotten is folded.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from align_unlearn.errors import UserError
from align_unlearn.files import read_json_lines, write_bytes
from align_unlearn.report.evidence_plots import attack_curves, leak_dots, share_dots
from align_unlearn.report.plots import GROUPS, MODELS, drift_dots, overlap_dots, verdict_bars
from align_unlearn.report.survival_plots import kept_bars, layer_maps
from align_unlearn.report.untrusted import differences, visible

LONGEST = 1200
"""Characters of an answer that the page shows."""
ROWS = 40
"""Rows of a group whose texts the page shows, leaks first; all are in records.jsonl."""
EXAMPLES = 4
"""Answers of a probe or an attack that the page shows."""


def write_report(folder: str | Path, *, withhold: bool = False) -> Path:
    """Writes `report.html` beside `audit.json` and returns its path; pages of earlier requests are written with it.

    Args:
        folder: a run, an export, or the audit folder in it.
        withhold: leave out what was leaked, so that the page can be shared.

    Raises:
        UserError: there is no audit there.
    """
    place = audit_folder(folder)
    if not (place / "records.jsonl").is_file():
        raise UserError("The audit's records.jsonl is not here.", where=str(place), fix="audit the run again")
    records = read_json_lines(place / "records.jsonl")
    audit = read_audit(place)
    for name in audit["earlier"]:
        if (own := place / "earlier" / safe_name(name) / "audit.json").is_file():
            write_report(own.parent, withhold=withhold)
    page = render(audit, [withheld(record) for record in records] if withhold else records, survival_of(place))
    write_page(place / "report.html", page)
    return place / "report.html"


def audit_folder(folder: str | Path) -> Path:
    """The folder that holds `audit.json`: the one given, or `audit` in it.

    Raises:
        UserError: there is no audit there.
    """
    place = Path(folder)
    found = [each for each in (place, place / "audit") if (each / "audit.json").is_file()]
    found = found or sorted(each.parent for each in place.glob("audit-*/audit.json"))
    if not found:
        raise UserError("There is no audit here.", where=str(folder), fix=f"align-unlearn audit {folder}")
    if len(found) > 1 and found[0] != place and found[0].name != "audit":
        names = ", ".join(each.name for each in found)
        raise UserError(f"There are several audits here: {names}.", where=str(folder), fix="name one of them")
    return found[0]


def read_audit(place: Path) -> dict[str, Any]:
    """What `audit.json` says, with what audits of earlier versions did not say.

    Raises:
        UserError: it is torn.
    """
    try:
        found: dict[str, Any] = json.loads((place / "audit.json").read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"This is no JSON: {error}.", where=str(place / "audit.json"), fix="audit again") from error
    return EARLIER | found


EARLIER: dict[str, Any] = {
    "settings": {}, "application": None, "manifest": {}, "unmeasured": [], "diagnosis": None, "worst": None,
    "failures": [], "costs": None, "control": None, "data": {}, "guard": None, "judge": None,
    "request": None, "earlier": {},
}  # fmt: skip
"""What an audit that says nothing of it is taken to have said."""


def write_page(path: Path, page: str) -> None:
    """Writes a page in one step; what is no Unicode becomes a question mark."""
    write_bytes(path, page.encode("utf-8", "replace"))


def safe_name(name: str) -> str:
    """The name of an earlier request as that of a folder, wherever the audit comes from.

    Raises:
        UserError: it would lead elsewhere.
    """
    if name in ("", ".", "..") or Path(name).name != name:
        raise UserError(f"An earlier request cannot be called {name!r}.", where="audit.json: earlier")
    return name


def survival_of(place: Path) -> dict[str, Any] | None:
    """What `survive` measured of the run that an audit's folder lies in; none where it did not."""
    file = place.parent / "survival/survival.json"
    if not file.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"This is no JSON: {error}.", where=str(file), fix="align-unlearn survive again") from error
    return found


def render(summary: dict[str, Any], records: list[dict[str, Any]], survival: dict[str, Any] | None = None) -> str:
    """The page of an audit, and of what `survive` measured of the same run."""
    audit = EARLIER | summary
    metrics = audit["metrics"]
    plots = [
        ("How often it leaks, by the way of asking", leak_dots(metrics)),
        ("What was said to the plain prompts", verdict_bars(records) if _any(records, "answers") else None),
        ("Attacks on the model", attack_curves(metrics)),
        ("What was to be forgotten, and membership", share_dots(metrics, ["forget", "membership"])),
        ("What was to stay", share_dots(metrics, ["retain", "utility"])),
        ("Drift on retained text", drift_dots(records) if _any(records, "likelihood", "retain") else None),
        ("Verbatim overlap", overlap_dots(records) if any("verbatim_run" in each for each in records) else None),
    ]
    return (
        environment()
        .get_template("template.html.jinja")
        .render(
            audit=audit,
            plots=[(title, plot) for title, plot in plots if plot],
            groups=side_by_side(records),
            tried=tried(records),
            names=GROUPS,
            models=MODELS,
            survival=survival,
            bars=kept_bars(survival["exports"]) if survival else None,
            maps=layer_maps(survival["exports"]) if survival else None,
        )
    )


def environment() -> Environment:
    """The templates: everything is escaped, and a name that is not there is an error."""
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    made.filters |= {
        "figure": figure,
        "share": share,
        "visible": visible,
        "differences": lambda after, before: differences(before, after),
    }
    return made


def withheld(record: dict[str, Any]) -> dict[str, Any]:
    """The record without what must not be said: the text, what was said to it, and prompts that hold a piece of it.

    A refusal of a harmful request is shown; one beside a text may quote it.
    """
    if record["group"] != "forget" or "completion" not in record:
        return record
    harmless = record["verdict"] == "refuse" and not record.get("reference") and record["probe"] == "answers"
    said = record["completion"] if harmless else "(withheld)"
    kept = {**record, "completion": said, "reference": record.get("reference") and "(withheld)"}
    if record["probe"] == "answers" and not record.get("plain"):
        return kept
    return {**kept, "prefill": "", "prompt": "(withheld)"}


def side_by_side(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each group its rows with every model's answer, leaks first: `rows`, and `more`: how many are not shown."""
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
    shown = {}
    for group, by_id in groups.items():
        bad = "leak" if group == "forget" else "refuse"
        ordered = sorted(by_id.values(), key=lambda row: _verdict(row) != bad)
        shown[group] = {"rows": ordered[:ROWS], "more": max(0, len(ordered) - ROWS)}
    return shown


def tried(records: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """For each probe and attack a few of the candidate's answers, leaks first and one a row."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if record["probe"] not in ("answers", "likelihood") and record["model"] == "candidate" and "verdict" in record:
            found.setdefault(record.get("attack", record["probe"]), []).append(record)
    examples = {}
    for name, own in found.items():
        chosen: dict[str, dict[str, Any]] = {}
        for record in sorted(own, key=lambda each: each["verdict"] != "leak"):
            chosen.setdefault(record["id"], {**record, "completion": record["completion"][:LONGEST],
                                             "way": record.get("variant", record.get("setting"))})  # fmt: skip
        examples[name] = list(chosen.values())[:EXAMPLES]
    return examples


def figure(value: float | None) -> str:
    """A figure as the tables show it: shares and small numbers with three digits, none as a dash."""
    if value is None:
        return "–"
    return f"{value:.3g}" if abs(value) >= 0.0005 or value == 0 else f"{value:.1e}"


def share(value: float) -> str:
    """A share in percent; one that is rare but not none does not become 0%."""
    percent = 100 * value
    return f"{percent:.0f}%" if percent >= 1 or percent == 0 else f"{percent:.1g}%"


def _verdict(row: dict[str, Any]) -> str | None:
    answer = row["answers"].get("candidate")
    return None if answer is None else str(answer["verdict"])


def _any(records: Sequence[dict[str, Any]], probe: str, group: str | None = None) -> bool:
    return any(each["probe"] == probe and (group is None or each["group"] == group) for each in records)
