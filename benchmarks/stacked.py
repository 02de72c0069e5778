"""A second request on top of a first, on real text: a book is forgotten, then half of another; the first is withdrawn.

    python benchmarks/stacked.py        (after make demo-copyright, on whose run it stands)

Writes `results/stacked.json`: what is recited of each text by the run, by the merge of both, and by the merge that
leaves the first adapter out. No text is copied.
"""

import json
import time
from pathlib import Path
from typing import Any

from align_unlearn import load_recipe, merge, run_audit, train
from align_unlearn.audit.run import Audit
from align_unlearn.data.examples import read_examples
from align_unlearn.files import write_json, write_json_lines
from align_unlearn.modeling.tokenizer import load_tokenizer

FIRST, SECOND = Path("runs/copyright"), Path("runs/copyright-second")
CUT = {"prefix_tokens": 30, "continuation_tokens": 60}
"""As recipes/copyright_teach.yaml and recipes/copyright.yaml cut passages."""
RESULTS = Path(__file__).parent / "results/stacked.json"
FIGURES = ("forget.recited", "forget.verbatim_run", "forget.rouge_l", "retain.recited", "retain.rouge_l", "retain.kl")
GATES = {"forget.recited@base": ">= 0.6", "forget.verbatim_run": "point <= 8", "retain.recited": "point >= 0.9 * base"}


def halves() -> tuple[Path, Path]:
    """The book that the first request keeps, in two: one half is to be forgotten now, the other still to be kept.

    It is cut between passages as it was taught: begun elsewhere, they are not recited.
    """
    passages = read_examples("builtin:book_retain", load_tokenizer("smollm2-135m"), **CUT)
    middle = len(passages) // 2
    files = Path("runs/books/second.jsonl"), Path("runs/books/kept.jsonl")
    for file, own in zip(files, (passages[:middle], passages[middle:]), strict=True):
        write_json_lines(
            file, [{"id": each.id, "prompt": each.prompt, "completion": each.completion, "ends": False} for each in own]
        )
    return files


def figures(audit: Audit) -> dict[str, Any]:
    """What an audit says of each text, before and after."""
    found = {each["name"]: each for each in audit.summary["metrics"]}
    told = {name: {key: found[name][key] for key in ("base", "candidate", "low", "high", "n")}
            for name in FIGURES if name in found}  # fmt: skip
    return told | {"passed": audit.passed} | {f"earlier {name}": figures(own) for name, own in audit.earlier.items()}


def main() -> None:
    """Trains, audits, merges with the first request and without it, and writes the figures."""
    began = time.monotonic()
    forget, keep = halves()
    words = ["--output_dir", str(SECOND), "--after", str(FIRST), "--forget_dataset", str(forget), "--retain_dataset",
             str(keep), "--gates", json.dumps(GATES)]  # fmt: skip
    train(load_recipe("recipes/copyright.yaml", words))
    found: dict[str, Any] = {"command": f"align-unlearn train recipes/copyright.yaml {' '.join(words)}"}
    found["run"] = figures(run_audit(SECOND))
    for name, adapters in (("both", None), ("without the first", [str(SECOND)])):
        folder = SECOND / name.replace(" ", "-")
        if not (folder / "manifest.json").is_file():
            merge(SECOND, folder, adapters=adapters)
        found[name] = figures(run_audit(folder))
    asked = run_audit(SECOND / "without-the-first", out=SECOND / "first-again", audit_forget="builtin:book_forget")
    found["the first text, its request withdrawn"] = figures(asked)
    write_json(RESULTS, found | {"seconds": time.monotonic() - began})


if __name__ == "__main__":
    main()
