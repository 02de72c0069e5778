"""What the audit's one reading saves: all teacher-forced figures from one forward pass, against one pass a figure.

    python benchmarks/audit_cost.py [MODEL [RUN]]

Both ways in the same run, on the same rows, with the same batches, in turns; the peer computes each metric on its own,
as suites do whose metrics each call the model. Then the suite `standard` on a run, with 100 rows to forget and 100 to
keep and nothing known from before. Writes `results/audit_cost.json`.
"""

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from align_unlearn.audit.likelihood import figures
from align_unlearn.audit.reading import read_texts
from align_unlearn.audit.run import run_audit
from align_unlearn.audit.subjects import open_subjects
from align_unlearn.data.examples import read_examples
from align_unlearn.data.tokens import tokenise
from align_unlearn.files import write_json
from align_unlearn.modeling.embedded import cache_folder

ROWS, TURNS, BATCH = 24, 2, 8
DEFAULTS = ["smollm2-135m", "runs/quickstart"]
ROWS_OF = {"audit_forget": "builtin:harmful", "audit_retain": "builtin:lookalikes", "audit_neighbours": None}


def main(model: str, run: str) -> None:
    """Measures and writes."""
    subjects = open_subjects(model, base=model)
    tokenizer = subjects["base"].tokenizer
    rows = [tokenise(tokenizer, each, max_length=None) for each in read_examples("builtin:chronicle")[:ROWS]]
    texts = [tokenizer.decode(each.completion_ids) for each in rows]
    one = {"base": subjects["base"]}
    names = [name for name in figures(read_texts(one, rows[:1])["base"][0], texts[0]) if not name.startswith("kl")]

    def at_once() -> list[dict[str, float]]:
        return [figures(each, text) for each, text in zip(read_texts(one, rows, BATCH)["base"], texts, strict=True)]

    def one_by_one() -> list[dict[str, float]]:
        found: list[dict[str, float]] = [{} for _ in rows]
        for name in names:
            for row, each, text in zip(found, read_texts(one, rows, BATCH)["base"], texts, strict=True):
                row[name] = figures(each, text)[name]
        return found

    seconds: dict[str, list[float]] = {"one_pass": [], "a_pass_each": []}
    found = {}
    for _ in range(TURNS):
        for name, way in (("one_pass", at_once), ("a_pass_each", one_by_one)):
            began = time.monotonic()
            found[name] = way()
            seconds[name].append(time.monotonic() - began)
    for row, other in zip(found["one_pass"], found["a_pass_each"], strict=True):
        if any(row[name] != other[name] for name in names):
            raise SystemExit("the two ways do not give the same figures")
    ratio = min(seconds["a_pass_each"]) / min(seconds["one_pass"])
    result: dict[str, Any] = {"model": model, "rows": ROWS, "metrics": names, "seconds": seconds, "ratio": ratio}
    print(f"{len(names)} metrics: one pass {min(seconds['one_pass']):.1f} s, a pass each "
          f"{min(seconds['a_pass_each']):.1f} s, {ratio:.1f} times")  # fmt: skip
    if Path(run).exists():
        result["standard"] = standard(run)
        print(f"standard on {run}: {result['standard']['total_seconds']:.0f} s")
    write_json(Path(__file__).parent / "results/audit_cost.json", result)


def standard(run: str) -> dict[str, Any]:
    """What `standard` costs with nothing in the cache but the model."""
    models = cache_folder() / "models"
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ALIGN_UNLEARN_CACHE"] = folder
        if models.is_dir():
            (Path(folder) / "models").symlink_to(models)
        found = run_audit(run, suite="standard", out=Path(folder) / "audit", **ROWS_OF)
    counts = {name: each["rows"] for name, each in found.summary["data"].items()}
    return {"run": run, "rows": counts, **found.summary["costs"]}


if __name__ == "__main__":
    main(*[*sys.argv[1:], *DEFAULTS[len(sys.argv) - 1 :]])
