"""Reinforcement learning against reward models: PPO, RLOO or GRPO, then audit, merge, and audit what will be served.

python recipes/online_rl.py [recipes/ppo_harmless.yaml] [--key value …]
"""

import sys
from pathlib import Path

from align_unlearn.script import main

if __name__ == "__main__":
    main(default=Path(__file__).with_name("ppo_harmless.yaml"), arguments=sys.argv[1:])
