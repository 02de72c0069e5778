"""Configurations of the online trainers: TRL's, with rewards, costs and the retain term beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trl import GRPOConfig, RLOOConfig

from align_unlearn.errors import UserError
from align_unlearn.rewards.load import RewardSpec, check_apart, check_judge, read_specs
from align_unlearn.training.configs import HeldArguments, _option, settle_precision


@dataclass
class OnlineArguments(HeldArguments):
    """What the online trainers share.

    `rewards` and `costs` map names to settings (align_unlearn/rewards/load.py). A cost is minus the score of a reward
    model, and is held at or under its `limit`: the policy maximises (reward − Σ λ·cost) / (1 + Σ λ).
    """

    rewards: dict | str | None = _option(None, "Reward models by name; see docs/rewards.md.")  # type: ignore[type-arg]
    costs: dict | str | None = _option(None, "Costs by name, each with a `limit`.")  # type: ignore[type-arg]
    cost_step: float = _option(0.5, "Step of the dual ascent on λ of each cost, after each batch of rollouts.")
    cost_highest: float = _option(20.0, "Bound of λ.")
    start_from: str | None = _option(
        None, "A run whose adapter the policy starts from: one that never refuses cannot be rewarded for it."
    )
    heldout_judge: dict | str | None = _option(  # type: ignore[type-arg]
        None, "A reward that is not trained on, watched beside the others. Default: the verdict rules."
    )
    retain_batch_size: int = _option(4, "Retain rows beside each micro-batch.")
    samples_every: int = _option(5, "Write the rollouts of every so many batches to samples.jsonl, with verdicts.")
    flat_groups: float | None = _option(
        None, "Stop when at least this share of groups had one reward throughout, over `flat_patience` logging windows."
    )
    flat_patience: int = _option(3, "How many such windows in a row.")
    disable_dropout: bool = _option(True, "No dropout: it would make the policy differ from itself.")

    def __post_init__(self) -> None:
        settle_precision(self)
        self.check_online()
        super().__post_init__()

    def specs(self, key: str) -> list[RewardSpec]:
        """The reward models under `rewards`, `costs` or `heldout_judge`.

        Raises:
            UserError: a setting is unknown or does not fit.
        """
        return read_specs(getattr(self, key), key)

    def check_rewarded(self) -> None:
        """Refuses to learn from nothing.

        Raises:
            UserError: there are no rewards and no costs.
        """
        if not self.specs("rewards") and not self.specs("costs"):
            raise UserError("There is no reward.", where="rewards", fix="rewards: {safe: {model: keywords, …}}")

    def check_online(self) -> None:
        """Refuses settings that cannot work.

        Raises:
            UserError: a cost without a limit, or with a reward's name; a path that would merge adapters into 4-bit
                weights.
        """
        self.check_retain()
        check_apart(self.specs("rewards"), self.specs("costs"))
        for spec in self.specs("costs"):
            if spec.limit is None:
                raise UserError("A cost needs a limit.", where=f"costs: {spec.name}", fix="limit: 0.05")
            if spec.weight != 1 or spec.normalise != "none" or spec.clip is not None:
                raise UserError(
                    "A cost is held in its own units: it has no weight, normalise or clip.",
                    where=f"costs: {spec.name}",
                    fix="leave them out; where a high score is bad, sign: -1",
                )
        for spec in self.specs("rewards"):
            if spec.limit is not None:
                raise UserError("A reward has no limit; a cost has.", where=f"rewards: {spec.name}")
        check_judge(self.specs("heldout_judge"), [*self.specs("rewards"), *self.specs("costs")])
        for name in ("retain_batch_size", "samples_every", "flat_patience"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1.", where=name)
        for name in ("cost_step", "cost_highest"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name} is {getattr(self, name)}; it cannot be negative.", where=name)
        if self.flat_groups is not None and not 0 < self.flat_groups <= 1:
            raise UserError(f"flat_groups is {self.flat_groups}; it is a share, above 0 and at most 1.",
                            where="flat_groups")  # fmt: skip
        if getattr(self, "entropy_coef", 0.0) or getattr(self, "use_adaptive_entropy", False):
            raise UserError("The LM head here gives entropies to log, without a gradient.", where="entropy_coef",
                            fix="leave it out; --temperature and --beta keep a policy from narrowing")  # fmt: skip
        if getattr(self, "router_aux_loss_coef", None):
            raise UserError(
                "The router's auxiliary loss is not computed here: the base is frozen.", where="router_aux_loss_coef"
            )
        for name in ("use_transformers_continuous_batching", "use_transformers_paged"):  # the second is its old name
            if getattr(self, name, False):
                raise UserError(
                    "Continuous batching takes the policy's trainable weights to bf16, where small steps are lost.",
                    where=name,
                    fix="leave it out",
                )
        if getattr(self, "use_vllm", False):
            raise UserError(
                "vLLM is given the policy by merging its adapter into the weights. In 4 bits that changes nothing: the "
                "rollouts would be the original's, whatever was learned. On an unquantised base it is not tried here.",
                where="use_vllm",
                fix="leave it out; rollouts then go through the adapter itself",
            )
        if getattr(self, "fp16", False):
            raise UserError("The online trainers do not know fp16's loss scale.", where="fp16", fix="--bf16 true")


@dataclass
class OnlineRLOOConfig(OnlineArguments, RLOOConfig):  # type: ignore[misc]
    """TRL's `RLOOConfig` for `OnlineRLOOTrainer`."""


@dataclass
class OnlineGRPOConfig(OnlineArguments, GRPOConfig):  # type: ignore[misc]
    """TRL's `GRPOConfig` for `OnlineGRPOTrainer`."""


PPO_BOUNDS = (
    ("gamma", 0, 1),
    ("lam", 0, 1),
    ("kl_coef", 0, None),
    ("vf_coef", 0, None),
    ("cliprange_value", 0, None),
    ("critic_warmup_steps", 0, None),
    ("missing_eos_penalty", 0, None),
    ("critic_learning_rate", 0, None),
)
"""Lowest and highest value of PPO's own settings."""


@dataclass
class PPOConfig(OnlineArguments, GRPOConfig):  # type: ignore[misc]
    """Proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347) on the seam of TRL's `GRPOConfig`.

    `num_iterations` is the number of epochs over each batch of rollouts, `steps_per_generation` the number of
    mini-batches that it is cut into, `epsilon` the clipping range of the policy's ratio.
    """

    num_generations: int | None = _option(1, "Completions a prompt; the critic stands in for a group.")
    num_iterations: int = _option(2, "Epochs over each batch of rollouts.")
    loss_type: str = _option("bnpo", "Kept: a mean over the tokens of a mini-batch.")
    gamma: float = _option(1.0, "Discount of later rewards.")
    lam: float = _option(0.95, "λ of generalised advantage estimation (arXiv:1506.02438).")
    cliprange_value: float = _option(0.2, "Clipping range of the value; 0 leaves it unclipped.")
    vf_coef: float = _option(0.5, "Weight of the value loss.")
    critic_learning_rate: float | None = _option(None, "Of critic and value head. Default: learning_rate.")
    critic_warmup_steps: int = _option(0, "Optimiser steps at first in which the critic alone learns.")
    kl_coef: float = _option(0.05, "Weight of the KL to the original in the reward, at first.")
    kl_target: float | None = _option(None, "Adapt kl_coef to hold the KL of rollouts here, nats a token.")
    kl_horizon: int = _option(200, "Rollouts over which that adapts (Ziegler et al. 2019, arXiv:1909.08593).")
    missing_eos_penalty: float = _option(0.0, "Taken off the reward of a completion that does not end.")
    whiten_advantages: bool = _option(True, "Advantages of mean 0 and deviation 1 over the tokens of a batch.")

    def __post_init__(self) -> None:
        self.check_ppo()
        # TRL's GRPO asks for two completions a prompt, to have a group
        asked, self.num_generations = self.num_generations, max(2, self.num_generations or 1)
        rows = self.generation_batch_size or self.per_device_train_batch_size * (self.steps_per_generation or 1)
        if rows % 2 and self.num_generations == 2 and asked == 1:
            raise UserError(
                "Rollouts come in even numbers.", where="per_device_train_batch_size · steps_per_generation"
            )
        super().__post_init__()
        self.num_generations = asked

    def check_ppo(self) -> None:
        """Refuses values that mean nothing.

        Raises:
            UserError: a value is out of its range, or another loss or KL of TRL's is asked for.
        """
        if self.beta:
            raise UserError("PPO has its KL in the reward.", where="beta", fix="--kl_coef, --kl_target")
        if self.loss_type != "bnpo":
            raise UserError("PPO has one loss.", where="loss_type", fix="leave it out, or --objective grpo")
        for name, low, high in PPO_BOUNDS:
            value = getattr(self, name)
            if value is None:
                continue
            if value < low or (high is not None and value > high):
                raise UserError(
                    f"{name} is {value}.", where=name, fix=f"{low} or more" + (f", at most {high}" if high else "")
                )
        if self.flat_groups is not None and self.num_generations == 1:
            raise UserError("PPO has no groups.", where="flat_groups", fix="leave it out")
        if self.kl_horizon < 1:
            raise UserError("kl_horizon must be at least 1.", where="kl_horizon")
        if self.kl_target is not None and not (self.kl_target > 0 and self.kl_coef > 0):
            raise UserError("An adaptive KL needs kl_target and kl_coef above 0.", where="kl_target")


ONLINE_CONFIGS: dict[str, Any] = {"ppo": PPOConfig, "rloo": OnlineRLOOConfig, "grpo": OnlineGRPOConfig}
"""The configuration of each online objective."""
