"""Trainer configurations: TRL's, with the retain term and the drift budget beside them."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from trl import DPOConfig, KTOConfig, SFTConfig

from align_unlearn.errors import UserError, unknown_name
from align_unlearn.objectives.table import RETAIN


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class HeldArguments:
    """What all trainers share that hold the policy near the original, and where they differ from TRL's defaults.

    The budget bounds three measures of KL(original ‖ policy) on retain rows, because a mean over tokens hides a model
    that changed only how it begins: the mean over tokens, the mean over the first tokens of the answer, and a high
    quantile over rows. Each has its own weight, which starts at `retain_coef` and is adapted by dual ascent.
    """

    retain: str | None = _option(
        None, "Retain term: kl, nll, kl+nll, js, hidden or none. Default: what the objective's paper uses."
    )
    retain_coef: float = _option(1.0, "Weight of the retain term; where the drift budget starts.")
    max_drift: float | None = _option(
        None, "Drift budget, nats a token of exact KL; 0 keeps retain_coef fixed. Default: 0.1 with retain kl, else 0."
    )
    retain_epsilon: float | None = _option(None, "Hold the retain loss at most here by dual ascent (pdu).")
    dual_step: float = _option(1.0, "Step of that dual ascent.")
    max_drift_opening: float | None = _option(None, "Budget of the opening tokens. Default: 4 times max_drift.")
    max_drift_tail: float | None = _option(None, "Budget of the 0.9 quantile over rows. Default: 4 times max_drift.")
    opening_tokens: int = _option(4, "How many tokens count as the opening of an answer.")
    drift_rate: float = _option(0.2, "Step of the dual ascent: how fast the weights follow the drift.")
    drift_patience: int | None = _option(None, "Stop when this many logging windows in a row were over the budget.")
    cache_ref_hidden: bool = _option(
        False, "Keep the original's hidden states on retain rows on disk: exact KL without a forward pass of it."
    )
    extrapolate: float = _option(
        1.0, "What the adapter's update is multiplied by when it is saved (arXiv:2404.16792): above 1 goes further."
    )
    learning_rate: float = _option(1e-4, "The initial learning rate for AdamW.")
    gradient_checkpointing: bool = _option(False, "Recompute activations in the backward pass to save memory.")
    report_to: str | None = _option("none", "trackio, wandb, tensorboard, or none.")
    remove_unused_columns: bool = _option(False, "Kept off: forget and retain rows travel together.")

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]  # TRL's configuration, which comes after this in every subclass
        self.check_devices()

    def check_devices(self) -> None:
        """Refuses to share the work out: gradients of roles and measures of the budget are of one process.

        Raises:
            UserError: there are several processes or devices.
        """
        found = max(self.world_size, self.n_gpu)  # type: ignore[attr-defined]
        if found > 1:
            raise UserError(f"One process trains on one device; there are {found}.", where="the machine",
                            fix="CUDA_VISIBLE_DEVICES=0 before the command, and no accelerate launch")  # fmt: skip

    def check_retain(self) -> None:
        """Refuses values that mean nothing.

        Raises:
            UserError: an unknown retain term, a budget below 0, or an update that would be erased or turned round.
        """
        if self.retain is not None and self.retain not in RETAIN:
            raise unknown_name("retain term", self.retain, RETAIN, where="retain")
        for name in ("max_drift", "max_drift_opening", "max_drift_tail", "retain_coef", "drift_rate", "dual_step"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise UserError(f"{name} is {value}; it cannot be negative.", where=name)
        if not 0 < self.extrapolate < math.inf:
            raise UserError(f"extrapolate is {self.extrapolate}; it must be a number above 0.", where="extrapolate")


@dataclass
class UnlearningArguments(HeldArguments):
    """What the trainers share that learn from given rows to forget."""

    forget_coef: float | None = _option(None, "Weight of the forget objective. Default: its paper's.")
    forget_target: float | None = _option(
        None, "Stop when the NLL of the forget rows, nats a token, has reached this over a logging window."
    )
    gradient_surgery: bool = _option(False, "Take out of the forget gradient what opposes the retain gradient.")
    precompute_ref_log_probs: bool = _option(
        True, "Compute the original's log-probabilities of what is to be forgotten once, before training."
    )


REPORTERS = {"trackio": "trackio", "wandb": "wandb", "tensorboard": "tensorboard"}
"""What `report_to` may name, and the package it takes; each is an extra of this project under its own name."""


def check_reporters(report_to: str | list[str] | None) -> None:
    """Refuses to report to what is not installed, before anything is loaded.

    Raises:
        UserError: a package is missing.
    """
    for name in [report_to] if isinstance(report_to, str) else report_to or []:
        if name in REPORTERS and importlib.util.find_spec(REPORTERS[name]) is None:
            raise UserError(
                f"{name} is not installed.", where="report_to", fix=f'pip install "align-unlearn[{name}]", or none'
            )


def changed_settings(config: Any) -> dict[str, Any]:
    """The keys of a trainer's configuration that are not at their default."""
    plain = type(config)(output_dir=config.output_dir)
    own = {entry.name: getattr(config, entry.name) for entry in fields(config) if entry.init}
    changed = {name: value for name, value in own.items() if value != getattr(plain, name)}
    if own.get("steps_per_generation") is not None:
        changed.pop("generation_batch_size", None)  # TRL works out one from the other and takes only one of them
    return changed


def settle_precision(config: Any) -> None:
    """No autocast unless it is asked for: the base computes in its own dtype, adapters in fp32.

    TRL's default is bf16 autocast everywhere, CPUs included. Where there is only a CPU, transformers takes the asking
    for a GPU's unless it is told so.
    """
    config.bf16 = bool(config.bf16)
    if config.bf16 and not torch.accelerator.is_available():
        config.use_cpu = True


@dataclass
class UnlearnConfig(UnlearningArguments, SFTConfig):  # type: ignore[misc]
    """TRL's `SFTConfig` for `UnlearnTrainer`."""

    beta: float | None = _option(None, "The objective's beta, where it has one. Default: its paper's.")
    objective_kwargs: dict | str | None = _option(None, "Other hyper-parameters of the objective.")  # type: ignore[type-arg]

    def __post_init__(self) -> None:
        settle_precision(self)
        self.check_retain()
        self.objective_kwargs = _mapping(self.objective_kwargs)
        if self.beta is not None and self.beta <= 0:
            raise UserError(f"beta is {self.beta}; it must be above 0.", where="beta")
        super().__post_init__()

    def hyper_parameters(self) -> dict[str, Any]:
        """What is handed to the objective by name."""
        own = dict(self.objective_kwargs or {})  # type: ignore[arg-type]
        return {"beta": self.beta, **own} if self.beta is not None else own


def _mapping(given: Any) -> dict[str, Any]:
    """Hyper-parameters from YAML or the command line; numbers that YAML reads as text (1e2) become numbers."""
    try:
        found = json.loads(given) if isinstance(given, str) else given or {}
    except json.JSONDecodeError as error:
        raise UserError(f"objective_kwargs is not JSON: {error.msg}.", where="objective_kwargs") from error
    if not isinstance(found, dict):
        raise UserError("objective_kwargs is a mapping.", where="objective_kwargs", fix="""'{"layer": 7}'""")
    return {str(key): _number(value) for key, value in found.items()}


def _number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


@dataclass
class RefusalDPOConfig(UnlearningArguments, DPOConfig):  # type: ignore[misc]
    """TRL's `DPOConfig` for `RefusalDPOTrainer`."""

    def __post_init__(self) -> None:
        settle_precision(self)
        self.check_retain()
        super().__post_init__()


@dataclass
class RefusalKTOConfig(UnlearningArguments, KTOConfig):  # type: ignore[misc]
    """TRL's `KTOConfig` for `RefusalKTOTrainer`."""

    def __post_init__(self) -> None:
        settle_precision(self)
        self.check_retain()
        if self.per_device_train_batch_size < 2:
            raise UserError("KTO estimates its reference point within a batch.", where="per_device_train_batch_size")
        super().__post_init__()


PREFERENCE_CONFIGS = {"dpo": RefusalDPOConfig, "kto": RefusalKTOConfig}
"""The configuration of each objective that is a trainer of TRL's."""
