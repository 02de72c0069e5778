"""Make an open-weights language model stop, show that it stopped, and ship it.

The public names are imported when they are first used, so that `import align_unlearn` and `--help` cost nothing.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

# No telemetry: TRL and the hub client send some unless told not to before they are imported.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"

_PUBLIC = {
    "UserError": "align_unlearn.errors",
    "Job": "align_unlearn.config",
    "BaseModelConfig": "align_unlearn.config",
    "RunDir": "align_unlearn.run_dir",
    "load_base": "align_unlearn.modeling.load",
    "load_tokenizer": "align_unlearn.modeling.tokenizer",
    "original": "align_unlearn.modeling.roles",
    "role": "align_unlearn.modeling.roles",
    "CompletionView": "align_unlearn.objectives.view",
    "FORGET": "align_unlearn.objectives.table",
    "RETAIN": "align_unlearn.objectives.table",
    "UnlearnConfig": "align_unlearn.training.configs",
    "UnlearnTrainer": "align_unlearn.training.unlearn",
    "RefusalDPOConfig": "align_unlearn.training.configs",
    "RefusalDPOTrainer": "align_unlearn.training.dpo",
    "RefusalKTOConfig": "align_unlearn.training.configs",
    "RefusalKTOTrainer": "align_unlearn.training.kto",
    "PPOConfig": "align_unlearn.training.online_configs",
    "PPOTrainer": "align_unlearn.training.ppo",
    "OnlineRLOOConfig": "align_unlearn.training.online_configs",
    "OnlineRLOOTrainer": "align_unlearn.training.online",
    "OnlineGRPOConfig": "align_unlearn.training.online_configs",
    "OnlineGRPOTrainer": "align_unlearn.training.online",
    "load_recipe": "align_unlearn.training.recipe",
    "train": "align_unlearn.training.job",
    "finetune": "align_unlearn.training.finetune",
    "load_lesson": "align_unlearn.training.finetune",
    "RewardModel": "align_unlearn.rewards.protocol",
    "load_reward": "align_unlearn.rewards.load",
    "load_reward_job": "align_unlearn.training.reward",
    "train_reward": "align_unlearn.training.reward",
    "run_audit": "align_unlearn.audit.run",
    "evaluate_tofu": "align_unlearn.audit.tofu_suite",
    "merge": "align_unlearn.export.merge",
    "write_report": "align_unlearn.report.html",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'align_unlearn' has no attribute '{name}'")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__
