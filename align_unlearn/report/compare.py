"""`compare_reports`: several audits side by side on one page: verdicts, gates and every metric with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from align_unlearn.errors import UserError
from align_unlearn.report.html import audit_folder, environment, read_audit, write_page


def compare_reports(folders: Sequence[str | Path], out: str | Path = "comparison.html") -> Path:
    """Writes a page that compares audits and returns its path.

    Args:
        folders: runs, exports or audit folders, two at the least.
        out: the page.

    Raises:
        UserError: there are fewer than two, or one holds no audit.
    """
    if len(folders) < 2:
        raise UserError("There is nothing to compare one audit with.", fix="name two folders or more")
    audits = [(str(folder), read_audit(audit_folder(folder))) for folder in folders]
    names = dict.fromkeys(metric["name"] for _, audit in audits for metric in audit["metrics"])
    table = []
    for name in names:
        found = [{each["name"]: each for each in audit["metrics"]}.get(name) for _, audit in audits]
        better = next(each["better"] for each in found if each)
        figures = [each["candidate"] for each in found if each and each["candidate"] is not None]
        best = {"lower": min, "higher": max}.get(better)
        table.append((name, found, best(figures) if best and len(figures) > 1 else None))
    page = environment().get_template("compare.html.jinja").render(audits=audits, table=table)
    write_page(Path(out), page)
    return Path(out)
