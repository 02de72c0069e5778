"""RLOO and GRPO against reward models, on TRL's own trainers, with the exact retain KL beside them.

TRL does the rollouts and the policy's loss; what is added here is the score of a rollout (rewards less weighed costs),
retain rows beside each micro-batch under the drift budget, and a state from which a killed run goes on to the numbers
of an unbroken one, half-used rollouts included.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from trl import GRPOTrainer, RLOOTrainer

from align_unlearn.data.batches import Cycle, pad_rows
from align_unlearn.data.examples import Example, Messages
from align_unlearn.data.tokens import prompt_ids
from align_unlearn.errors import UserError
from align_unlearn.modeling.fused_head import use_compact_head
from align_unlearn.modeling.roles import POLICY
from align_unlearn.objectives.view import CompletionView
from align_unlearn.rewards.load import check_apart, check_judge
from align_unlearn.rewards.mix import RewardMix, check_coverage
from align_unlearn.rewards.protocol import as_messages
from align_unlearn.run_dir import RunDir
from align_unlearn.training.callbacks import FLAT, FlatGroups, SamplesFromStart
from align_unlearn.training.dual import DualWeight
from align_unlearn.training.held import HeldTrainer
from align_unlearn.training.rollouts import Rollouts
from align_unlearn.training.unlearn import tokenised

ROLLOUTS = "rollouts.safetensors"
KEPT_OUT = ("trainer_state", "log_extra", "log_metric", "environments")
"""What TRL hands to reward functions beside the columns, with no item a row; rewards learn of it by `FollowsRun`."""


class OnlineTrainer(HeldTrainer):
    """A mix-in before TRL's `RLOOTrainer` or `GRPOTrainer`.

    Args:
        model: the base model, without adapters.
        args: the configuration; its `rewards`, `costs` and `heldout_judge` are loaded where none are given here.
        train_dataset: rows of `prompt` (text or messages), and where known `kind` (forget, neighbour, retain) and
            `reference`; other columns are handed to the rewards.
        retain_dataset: rows to keep, in any format; may be none with `retain="none"`.
        processing_class: the tokenizer.
        peft_config: the adapter.
        rewards: reward models in place of the configuration's.
        callbacks: as in TRL.

    Raises:
        UserError: no reward applies to some of the rows; a retain term without rows.
    """

    loss_is_scaled_for_ga: bool | None
    num_iterations: int
    _step: int
    _buffered_inputs: Any

    def __init__(
        self,
        model: Any,
        args: Any,
        *,
        train_dataset: Any,
        retain_dataset: Any | None = None,
        processing_class: Any,
        peft_config: Any,
        rewards: RewardMix | None = None,
        callbacks: list[Any] | None = None,
    ) -> None:
        self.rollouts = make_rollouts(args, rewards)
        if "kind" in train_dataset.column_names:
            check_coverage(self.rollouts.trained_on, train_dataset["kind"])
        self.scores: list[float] = []
        super().__init__(  # type: ignore[call-arg]
            model=model,
            reward_funcs=[self.reward],
            args=args,
            train_dataset=train_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            callbacks=callbacks,
        )
        self.aux_loss_enabled = False  # of mixture-of-experts models; refused where it is asked for
        use_compact_head(self.model, args.temperature)
        if args.start_from:
            load_start(self.model, Path(args.start_from))
        rows = None if retain_dataset is None else tokenised(retain_dataset, processing_class, None)
        self.retain_rows = self.hold(rows, args.retain or "kl")
        self.retain_order = None if self.retain_rows is None else Cycle(len(self.retain_rows), args.seed)
        self.rollouts.attach(self.model, processing_class)
        self.rollouts.follow(lambda: self.state, self.note)
        self.flat_groups = FlatGroups(args.flat_groups, args.flat_patience, self.stop_rules)
        self.add_callback(self.flat_groups)
        self.add_callback(SamplesFromStart(self.rollouts.samples))

    def reward(self, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        """What TRL calls to score a batch of rollouts."""
        asked: list[Messages] = [as_messages(prompt) for prompt in prompts]
        said = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
        kept = {name: values for name, values in columns.items() if name not in KEPT_OUT}
        kept["plain"] = [isinstance(prompt, str) for prompt in prompts]
        if not self.model.training:
            self.scores = self.rollouts.weighed(asked, said, kept)
            return self.scores
        self.scores = self.rollouts.score(asked, said, kept, self.state.global_step, self.note)
        if self.args.num_generations > 1:
            self.note(FLAT, flat_share(self.scores, self.args.num_generations))
        return self.scores

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        """The ids that the model is asked with at inference, and in the audit."""
        asked = [Example(prompt, None, f"prompt {at} of a batch", "") for at, prompt in enumerate(prompts)]
        return [prompt_ids(self.processing_class, each) for each in asked], None, {}

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """TRL's loss and the retain term, on the scale that TRL's loss has under gradient accumulation."""
        loss: Tensor = super()._compute_loss(model, inputs)  # type: ignore[misc]
        self.check_finite(loss)
        return loss + self.retain_loss(model) if model.training else loss

    def retain_loss(self, model: Any) -> Tensor | float:
        """The weighted retain term on this micro-batch's retain rows."""
        if self.retain_term is None or self.retain_order is None:
            return 0.0
        with self.accelerator.autocast():
            retain = self.check_finite(self.retain_term(CompletionView(model, **self._retain_batch())))
        self.note("retain_loss", retain)
        return retain / self.current_gradient_accumulation_steps if self.loss_is_scaled_for_ga else retain

    def _retain_batch(self) -> dict[str, Any]:
        size, order, kept = self.args.retain_batch_size, self.retain_order, self.retain_rows
        assert order is not None
        assert kept is not None
        rows = [kept[order[self._step * size + at]] for at in range(size)]
        batch: dict[str, Any] = self._prepare_input(pad_rows(rows, self._tokenizer.pad_token_id))
        return batch

    def extra_state(self, checkpoint: Path) -> dict[str, Any]:
        """The running rewards and λ; rollouts that are not used up go into a file of their own."""
        generate_every = self.args.steps_per_generation * self.num_iterations
        if self._buffered_inputs is not None and self._step % generate_every:
            save_file(_flat(self._buffered_inputs), checkpoint / ROLLOUTS)
        for name, head in getattr(self.model, "reward_heads", {}).items():
            head.save(checkpoint / f"{name}_head.safetensors")
        return {
            **super().extra_state(checkpoint),
            "rollouts": self.rollouts.state_dict(),
            "micro_step": self._step,
            "flat_windows": self.flat_groups.windows,
        }

    def load_extra_state(self, checkpoint: Path, state: dict[str, Any]) -> None:
        """Takes up where `extra_state` was taken."""
        super().load_extra_state(checkpoint, state)
        self.rollouts.load_state_dict(state["rollouts"])
        self._step, self.flat_groups.windows = state["micro_step"], state["flat_windows"]
        if (checkpoint / ROLLOUTS).is_file():
            self._buffered_inputs = _nested(load_file(checkpoint / ROLLOUTS, device=str(self.accelerator.device)))
        for name, head in getattr(self.model, "reward_heads", {}).items():
            head.load(checkpoint / f"{name}_head.safetensors")


class OnlineRLOOTrainer(OnlineTrainer, RLOOTrainer):  # type: ignore[misc]
    """REINFORCE leave-one-out (Ahmadian et al. 2024, arXiv:2402.14740), TRL's, with the k1 KL in the reward."""


class OnlineGRPOTrainer(OnlineTrainer, GRPOTrainer):  # type: ignore[misc]
    """Group-relative policy optimisation (Shao et al. 2024, arXiv:2402.03300), TRL's."""


def load_start(model: Any, run: Path) -> None:
    """Gives the policy the adapter of another run; the original stays the base.

    Raises:
        UserError: the run is not finished, or its adapter is of another shape or base.
    """
    folder = RunDir.finished(run).adapter
    found = load_file(folder / "adapter_model.safetensors")
    made = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    scale = {name: getattr(model.peft_config[POLICY], name) for name in ("r", "lora_alpha", "use_rslora")}
    own = {name.replace(f".{POLICY}.", "."): value for name, value in model.named_parameters() if f".{POLICY}." in name}
    fits = found.keys() == own.keys() and all(found[name].shape == own[name].shape for name in own)
    if not fits or any(made.get(name) != value for name, value in scale.items()):
        raise UserError(
            "The adapter to start from is of another shape or scale.",
            where=f"start_from {run}",
            fix="the same lora_r, lora_alpha and lora_target_modules in both recipes",
        )
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(found[name])


def make_rollouts(args: Any, rewards: RewardMix | None = None) -> Rollouts:
    """Rewards, costs and held-out judge of a configuration.

    Raises:
        UserError: a reward model cannot be made, or has the name of a cost, or is the held-out judge too.
    """
    if rewards is None:
        args.check_rewarded()
    costs, heldout = args.specs("costs"), args.specs("heldout_judge")
    if rewards is not None:
        check_apart(rewards.specs, costs)
        check_judge(heldout, [*rewards.specs, *costs])
    duals = {
        spec.name: DualWeight(spec.limit, start=0.0, step=args.cost_step, highest=args.cost_highest) for spec in costs
    }
    return Rollouts(
        rewards or RewardMix(args.specs("rewards")),
        RewardMix(costs) if costs else None,
        duals,
        RewardMix(heldout) if heldout else None,
        Path(args.output_dir) / "samples.jsonl",
        args.samples_every,
    )


def flat_share(scores: Sequence[float], group: int) -> float:
    """Share of groups of completions that all have one score: before any KL, which always differs a little."""
    groups = [scores[at : at + group] for at in range(0, len(scores), group)]
    return sum(max(each) - min(each) < 1e-9 for each in groups) / len(groups)


def _flat(batches: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    return {
        f"{at}.{name}": value.detach().clone().contiguous()
        for at, batch in enumerate(batches)
        for name, value in batch.items()
        if isinstance(value, Tensor)
    }


def _nested(flat: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    batches: dict[int, dict[str, Tensor]] = {}
    for key, value in flat.items():
        at, _, name = key.partition(".")
        batches.setdefault(int(at), {})[name] = value
    return [batches[at] for at in sorted(batches)]
