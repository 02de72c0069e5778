"""Make a model forget text: NPO (or any objective on forget rows) with a drift budget on what must stay.

    python recipes/npo.py [recipes/copyright.yaml] [--key value …]

Trains, audits the adapter, merges it into a plain model folder, and audits that folder as it will be served.
"""

import sys
from pathlib import Path

from align_unlearn.script import main

if __name__ == "__main__":
    main(default=Path(__file__).with_name("copyright.yaml"), arguments=sys.argv[1:])
