"""`write_survival_page`: what each way of shipping leaves of the forgetting, as a table, bars and a map by layer."""

from __future__ import annotations

import json
from pathlib import Path

from align_unlearn.errors import UserError
from align_unlearn.report.html import environment, write_page
from align_unlearn.report.survival_plots import kept_bars, layer_maps


def write_survival_page(folder: str | Path) -> Path:
    """Writes `survival.html` beside `survival.json` and returns its path.

    Raises:
        UserError: nothing was measured there.
    """
    place = Path(folder)
    if not (place / "survival.json").is_file():
        raise UserError("There is no survival.json here.", where=str(folder), fix="align-unlearn survive RUN")
    found = json.loads((place / "survival.json").read_text("utf-8"))
    page = (
        environment()
        .get_template("survival.html.jinja")
        .render(survival=found, bars=kept_bars(found["exports"]), maps=layer_maps(found["exports"]))
    )
    write_page(place / "survival.html", page)
    return place / "survival.html"
