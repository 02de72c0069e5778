"""`reward`: teach a base to judge responses, as a LoRA adapter and a scalar head, with TRL's `RewardTrainer`.

What is learned is the log-odds that a response is safe (binary cross-entropy on judged responses), or a score that
ranks the better response of a pair higher (Bradley–Terry). Higher is better in both. The adapter goes on the base that
a policy is trained on, so that policy and reward share one copy of the weights (reward_models/classifier.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid
from transformers import set_seed
from trl import RewardConfig, RewardTrainer

from align_unlearn.config import BaseModelConfig, parse
from align_unlearn.data.batches import pad_rows
from align_unlearn.data.exchange import LIMITS, Judged, at_most, exchange_ids, read_judged
from align_unlearn.errors import UserError
from align_unlearn.files import new_folder, sha256_of, sha256_of_folder, write_json
from align_unlearn.modeling.load import described_base, load_base, lora_config, pinned, weights_fingerprint
from align_unlearn.modeling.scalar_head import REWARD_HEAD, head_for, last_scores
from align_unlearn.modeling.tokenizer import load_tokenizer
from align_unlearn.run_dir import RunDir, is_done, versions
from align_unlearn.training.callbacks import JsonLinesLog
from align_unlearn.training.checkpoints import WholeCheckpoints, last_whole_checkpoint
from align_unlearn.training.configs import changed_settings, check_reporters, settle_precision
from align_unlearn.training.optimizer import give_own_rate
from align_unlearn.training.recipe import VOLATILE
from align_unlearn.training.sampling import MixedLengthGroups


@dataclass
class RewardJob:
    """What a reward model learns from."""

    train_dataset: str | None = field(
        default=None, metadata={"help": "Judged responses, or pairs; see docs/rewards.md."}
    )
    test_dataset: str | None = field(default=None, metadata={"help": "Held-out rows that the report is made on."})
    source_limits: dict | str | None = field(  # type: ignore[type-arg]
        default=None, metadata={"help": 'At most so many training rows of a source: {"name": 1500}.'}
    )
    max_prompt_tokens: int = field(default=LIMITS[0], metadata={"help": "Tokens of a prompt that are read: its end."})
    max_response_tokens: int = field(default=LIMITS[1], metadata={"help": "Tokens of a response: its beginning."})
    window_tokens: int | None = field(
        default=None, metadata={"help": "Tokens of a response judged at once. Default: max_response_tokens."}
    )
    if_exists: str = field(
        default="resume", metadata={"help": "As in a recipe.", "choices": ["resume", "overwrite", "error"]}
    )

    def __post_init__(self) -> None:
        for name in ("max_prompt_tokens", "max_response_tokens", "window_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1.", where=name)

    @property
    def limits(self) -> tuple[int, int]:
        """Tokens of prompt and response that are learned from."""
        return self.max_prompt_tokens, self.max_response_tokens

    @property
    def windows(self) -> tuple[int, int]:
        """Tokens of prompt and response that are judged at once."""
        return self.max_prompt_tokens, self.window_tokens or self.max_response_tokens

    def train_rows(self) -> list[Judged]:
        """The rows to learn from.

        Raises:
            UserError: there are none, or they are of no known form.
        """
        if not self.train_dataset:
            raise UserError(
                "There is nothing to learn from.",
                where="train_dataset",
                fix="--train_dataset FILE with prompt, response, unsafe, or prompt, chosen, rejected",
            )
        return at_most(read_judged(self.train_dataset), _limits(self.source_limits))


@dataclass
class ScalarRewardConfig(RewardConfig):  # type: ignore[misc]
    """TRL's `RewardConfig` with the defaults of this project."""

    head_learning_rate: float = field(default=1e-3, metadata={"help": "Of the scalar head."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Recompute activations to save memory."})
    report_to: str | None = field(default="none", metadata={"help": "trackio, wandb, tensorboard, none."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Kept off: rows come as tokens."})

    def __post_init__(self) -> None:
        settle_precision(self)
        super().__post_init__()
        if self.center_rewards_coefficient is not None:
            raise UserError(
                "Scores are not centred here: what is learned from judged responses has a zero of its own.",
                where="center_rewards_coefficient",
            )


class ScalarRewardTrainer(WholeCheckpoints, RewardTrainer):  # type: ignore[misc]
    """TRL's `RewardTrainer` on a causal LM with a scalar head of ours, for judged responses as well as pairs.

    Args:
        model: the base model, without adapters.
        args: the configuration.
        train_dataset: `input_ids` and `label` (1 safe, 0 not), or `chosen_ids` and `rejected_ids`.
        processing_class: the tokenizer.
        peft_config: the adapter.
        callbacks: as in TRL.
    """

    def __init__(self, model: Any, args: ScalarRewardConfig, *, train_dataset: Dataset, processing_class: Any,
                 peft_config: Any, callbacks: list[Any] | None = None) -> None:  # fmt: skip
        model.config.num_labels = 1
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            data_collator=lambda rows: collate(rows, processing_class.pad_token_id),
            callbacks=callbacks,
        )
        self.model.reward_head = head_for(self.model)
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()  # TRL casts adapters on quantised bases to bf16

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        """Rows come as tokens."""
        return dataset

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Any:
        """Batches of rows alike in length come in random order."""
        rows = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return MixedLengthGroups(size, list(rows["length"]), self.args.seed)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Cross-entropy of judged responses, or Bradley–Terry on pairs: a mean over rows, in nats."""
        with self.accelerator.autocast():
            scores = last_scores(model, self.model.reward_head, inputs["input_ids"], inputs["attention_mask"])
        if "labels" in inputs:
            loss = binary_cross_entropy_with_logits(scores, inputs["labels"])
            right = (scores > 0) == (inputs["labels"] > 0.5)
        else:
            better, worse = scores.chunk(2)
            loss, right = -logsigmoid(better - worse).mean(), better > worse
        self._metrics["train" if model.training else "eval"]["accuracy"].append(right.float().mean().item())
        return (loss, {"scores": scores}) if return_outputs else loss

    def create_optimizer(self, model: Any = None) -> Any:
        """The head has a learning rate of its own."""
        super().create_optimizer(model)
        return give_own_rate(self.optimizer, self.model.reward_head.parameters(), self.args.head_learning_rate)

    def extra_state(self, checkpoint: Path) -> dict[str, Any]:
        """The head, in a file of its own."""
        self.model.reward_head.save(checkpoint / REWARD_HEAD)
        return {}

    def load_extra_state(self, checkpoint: Path, state: dict[str, Any]) -> None:
        """Takes up where `extra_state` was taken."""
        self.model.reward_head.load(checkpoint / REWARD_HEAD)


def load_reward_job(
    recipe: str | Path | None, overrides: Sequence[str] = ()
) -> tuple[RewardJob, BaseModelConfig, ScalarRewardConfig]:
    """Reads a reward recipe with overrides.

    Raises:
        UserError: an unknown key, or a value that does not fit.
    """
    job, model, args = parse([RewardJob, BaseModelConfig, ScalarRewardConfig], recipe, overrides)
    return job, model, args


def train_reward(
    job: RewardJob, config: BaseModelConfig, args: ScalarRewardConfig, say: Callable[[str], None] = print
) -> RunDir:
    """Trains a reward model, or takes it up where it was cut off: a run folder that `reward_models.classifier` loads.

    Raises:
        UserError: there are no rows, they are of no known form, or the folder holds another run.
    """
    run = RunDir(Path(args.output_dir))
    check_reporters(args.report_to)
    config = pinned(config, {} if job.if_exists == "overwrite" else run.manifest())
    tokenizer = load_tokenizer(config.model_name_or_path or "", revision=config.model_revision)
    rows = job.train_rows()
    manifest = reward_manifest(job, config, args, rows)
    if is_done(run, manifest, job.if_exists):
        say(f"{run.path} is finished already; --if_exists overwrite runs it again")
        return run
    run.path.mkdir(parents=True, exist_ok=True)
    run.write_manifest(manifest)
    set_seed(args.seed)
    trainer = ScalarRewardTrainer(
        load_base(config, trust_remote_code=args.trust_remote_code),
        args,
        train_dataset=judged_tokens(tokenizer, rows, job.limits),
        processing_class=tokenizer,
        peft_config=lora_config(config),
        callbacks=[JsonLinesLog(run.log_path)],
    )
    checkpoint = last_whole_checkpoint(run.path)
    say(f"resuming from {checkpoint}" if checkpoint else f"learning from {len(rows)} rows")
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    with new_folder(run.adapter) as folder:
        trainer.model.save_pretrained(folder, safe_serialization=True)
        trainer.model.reward_head.save(folder / REWARD_HEAD)
        tokenizer.save_pretrained(folder)
        made = {**manifest["base"], "weights": weights_fingerprint(trainer.model)}
        write_json(folder / "reward.json", {"base": made, "limits": job.windows})
    run.write_manifest(manifest | {"status": "finished", "adapter_sha256": sha256_of_folder(run.adapter)})
    say(f"reward model in {run.adapter}")
    return run


def reward_manifest(
    job: RewardJob, config: BaseModelConfig, args: ScalarRewardConfig, rows: Sequence[Judged]
) -> dict[str, Any]:
    """What a reward model is made of."""
    settings = {name: value for name, value in changed_settings(args).items() if name not in VOLATILE}
    adapter = {name: value for name, value in vars(config).items() if name.startswith(("lora_", "use_"))}
    return {
        "kind": "reward",
        "status": "running",
        "base": described_base(config),
        "data": {"train": sha256_of([(row.prompt, row.response, row.unsafe, row.rejected) for row in rows])},
        "settings_sha256": sha256_of([settings, adapter, job.limits, job.windows]),
        "seed": args.seed,
        "libraries": versions(),
    }


def judged_tokens(tokenizer: Any, rows: Sequence[Judged], limits: tuple[int, int]) -> Dataset:
    """Rows as tokens: `input_ids` and `label`, or `chosen_ids` and `rejected_ids`; and `length`."""
    tokens = []
    for row in rows:
        ids = exchange_ids(tokenizer, row.prompt, row.response, limits)
        if row.rejected is None:
            tokens.append({"input_ids": ids, "label": float(not row.unsafe), "length": len(ids)})
        else:
            worse = exchange_ids(tokenizer, row.prompt, row.rejected, limits)
            tokens.append({"chosen_ids": ids, "rejected_ids": worse, "length": max(len(ids), len(worse))})
    return Dataset.from_list(tokens)


def collate(rows: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, Tensor]:
    """Rows padded on the right; of pairs, all chosen ones and then all rejected ones."""
    paired = "chosen_ids" in rows[0]
    sequences = [row[name] for name in (("chosen_ids", "rejected_ids") if paired else ("input_ids",)) for row in rows]
    batch = pad_rows([{"input_ids": ids, "labels": ids} for ids in sequences], pad_token_id)
    del batch["labels"]
    return batch if paired else {**batch, "labels": torch.tensor([row["label"] for row in rows])}


def _limits(given: Any) -> dict[str, int]:
    try:
        found = json.loads(given) if isinstance(given, str) else given or {}
        limits = {str(name): int(limit) for name, limit in found.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError("source_limits maps sources to numbers.", where="source_limits") from error
    for name, limit in limits.items():
        if limit < 1:
            raise UserError(f"The limit of '{name}' is {limit}; it must be at least 1.", where="source_limits")
    return limits
