"""Teach a model to refuse: DPO with refusals, look-alikes the other way round, and a drift budget.

    python recipes/dpo_refusals.py [recipes/quickstart.yaml] [--key value …]

Trains, audits the adapter, merges it into a plain model folder, and audits that folder as it will be served.
"""

import sys
from pathlib import Path

from align_unlearn.script import main

if __name__ == "__main__":
    main(default=Path(__file__).with_name("quickstart.yaml"), arguments=sys.argv[1:])
