"""Your own objective: one function of a `CompletionView`, trained, audited and merged like any of the table.

    python recipes/own_objective.py [recipes/own_objective.yaml] [--key value …]

The same from the command line: align-unlearn train RECIPE --objective recipes/own_objective.py:bounded_ascent
"""

import sys
from pathlib import Path

from torch import Tensor

from align_unlearn import CompletionView
from align_unlearn.script import main


def bounded_ascent(view: CompletionView, *, ceiling: float = 8.0) -> Tensor:
    """Gradient ascent that stops once a row's NLL has reached `ceiling` nats a token. (B,)"""
    return -(-view.logps.sum(-1) / view.lengths).clamp(max=ceiling)


if __name__ == "__main__":
    words = [*sys.argv[1:], "--objective", f"{__file__}:bounded_ascent"]
    main(default=Path(__file__).with_name("own_objective.yaml"), arguments=words)
