"""Harmlessness by a classifier: one made here (an adapter with a scalar head), or any of transformers' classifiers.

    rewards:
      safe: {model: classifier, kwargs: {path: runs/reward}}
      toxic: {model: classifier, kwargs: {path: unitary/toxic-bert, label: toxic, sign: -1, reads: response}}

A run folder of recipes/reward_model.py sits on the policy's own base, as one more adapter, if the base is the same: no
second copy of the weights. Alone (`reward check`) it loads its base itself.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from align_unlearn.config import BaseModelConfig
from align_unlearn.data.batches import pad_rows
from align_unlearn.data.examples import Messages
from align_unlearn.data.exchange import exchange_windows, plain_prompt, without_specials
from align_unlearn.errors import UserError, unknown_name
from align_unlearn.files import sha256_of_folder
from align_unlearn.modeling.load import load_base, weights_fingerprint
from align_unlearn.modeling.roles import evaluating, role
from align_unlearn.modeling.scalar_head import REWARD_HEAD, head_for, last_scores
from align_unlearn.modeling.tokenizer import load_tokenizer
from align_unlearn.run_dir import is_reward

READS = ("exchange", "response")
LONGEST = 2048
"""Tokens of an exchange that a sequence classifier is shown, where it takes as many."""


class Classifier:
    """A classifier over prompt and response.

    Args:
        path: a run folder of recipes/reward_model.py, else a folder or hub id of a sequence classifier.
        label: of a sequence classifier with several labels, the one whose log-odds are the score.
        sign: -1 where a high score is bad.
        batch_size: rows at once.
        reads: what a sequence classifier is shown: the `exchange` (by the tokenizer's chat template where it has one,
            else prompt and response as a pair), or the `response` alone.

    Raises:
        UserError: nothing of the kind is there.
    """

    def __init__(
        self, path: str, label: str | None = None, sign: float = 1.0, batch_size: int = 32, reads: str = "exchange"
    ) -> None:
        if reads not in READS:
            raise unknown_name("reads", reads, READS, where="reward classifier")
        self.scorer = Adapter(Path(path)) if is_reward(path) else Sequences(path, label, reads)
        self.sign = sign
        self.batch_size = batch_size

    def attach(self, model: Any, tokenizer: Any) -> None:
        """Puts an adapter made here onto the policy's base.

        Raises:
            UserError: it was made on another base.
        """
        if isinstance(self.scorer, Adapter):
            self.scorer.attach(model, tokenizer)

    def score(self, prompts: list[Messages], completions: list[str], **columns: Any) -> list[float]:
        """Log-odds of the label (of being safe, from a run folder), times `sign`."""
        order = sorted(range(len(prompts)), key=lambda at: -len(completions[at]))  # alike in length: little padding
        found = [0.0] * len(prompts)
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            odds = self.scorer.log_odds([prompts[at] for at in rows], [completions[at] for at in rows])
            for at, value in zip(rows, odds, strict=True):
                found[at] = self.sign * value
        return found


class Adapter:
    """A LoRA adapter and a scalar head on a base, the policy's or its own.

    Args:
        run: the run folder.
    """

    def __init__(self, run: Path) -> None:
        self.folder = run / "adapter"
        if not (self.folder / REWARD_HEAD).is_file():
            raise UserError("The reward model is not finished.", where=str(run), fix="run its recipe again; it resumes")
        made = json.loads((self.folder / "reward.json").read_text("utf-8"))
        self.base, self.limits = made["base"], tuple(made["limits"])
        self.name = f"reward_{sha256_of_folder(self.folder)[:8]}"
        self.model: Any = None

    def attach(self, model: Any, tokenizer: Any) -> None:
        """Loads the adapter beside the policy's."""
        if weights_fingerprint(model) != self.base["weights"]:
            raise UserError(
                f"The reward model was made on {self.base['name']} in {self.base['precision']}, which is not the "
                "policy's base.",
                where=str(self.folder),
                fix="the same model_name_or_path, load_in_4bit and dtype in both recipes",
            )
        flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        model.load_adapter(str(self.folder), self.name, is_trainable=False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags.get(name, False))
        self.model, self.tokenizer = model, tokenizer
        self.head = head_for(model).requires_grad_(False)
        self.head.load(self.folder / REWARD_HEAD)
        # beside the adapter, so that the policy's checkpoints hold both
        model.reward_heads = torch.nn.ModuleDict({**getattr(model, "reward_heads", {}), self.name: self.head})

    def open(self) -> None:
        """Loads the base itself, for scoring without a policy."""
        from peft import PeftModel

        four_bit = self.base["precision"].startswith(("nf4", "fp4"))
        config = BaseModelConfig(
            model_name_or_path=self.base["name"],
            model_revision=self.base["revision"] or "main",
            load_in_4bit=four_bit,
            load_in_8bit=self.base["precision"] == "int8",
            dtype=self.base["precision"].rpartition("+")[2],
            **({"bnb_4bit_quant_type": self.base["precision"][:3]} if four_bit else {}),
        )
        self.model = PeftModel.from_pretrained(load_base(config), str(self.folder), adapter_name=self.name)
        self.tokenizer = load_tokenizer(self.base["name"])
        self.head = head_for(self.model).requires_grad_(False)
        self.head.load(self.folder / REWARD_HEAD)
        if weights_fingerprint(self.model) != self.base["weights"]:
            raise UserError(
                f"{self.base['name']} is not what it was when the reward model was made.",
                where=str(self.folder),
                fix="the same weights, or train the reward model again",
            )

    @torch.no_grad()
    def log_odds(self, prompts: Sequence[Messages], completions: Sequence[str]) -> list[float]:
        """Log-odds of being safe; of a long response those of its worst window."""
        if self.model is None:
            self.open()
        windows = [
            exchange_windows(self.tokenizer, plain_prompt(prompt[-1:]), completion, self.limits)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        rows = [window for exchange in windows for window in exchange]
        batch = pad_rows([{"input_ids": row, "labels": row} for row in rows], self.tokenizer.pad_token_id)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        with evaluating(self.model), role(self.model, self.name):
            scores = last_scores(self.model, self.head, ids.to(self.model.device), mask.to(self.model.device))
        said = iter(scores.tolist())
        return [min(next(said) for _ in exchange) for exchange in windows]


class Sequences:
    """A sequence classifier of transformers.

    Args:
        path: a folder or a hub id.
        label: whose log-odds are the score.
        reads: of `READS`.
    """

    def __init__(self, path: str, label: str | None, reads: str) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path)
            self.model, loaded = AutoModelForSequenceClassification.from_pretrained(
                path, dtype=torch.float32, output_loading_info=True
            )
        except (OSError, ValueError) as error:
            raise UserError(f"No classifier could be loaded: {str(error).splitlines()[0]}", where=path) from error
        if loaded["missing_keys"]:
            raise UserError(
                f"The model is no classifier: it has no {', '.join(sorted(loaded['missing_keys'])[:3])}, and would be "
                "given a random one.",
                where=path,
                fix="a sequence classifier; a causal LM can be a `judge`",
            )
        self.model.eval()
        self.reads = reads
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if self.model.config.pad_token_id is None:
            self.model.config.pad_token_id = self.tokenizer.pad_token_id
        names = {name: at for at, name in self.model.config.id2label.items()}
        if label is not None and label not in names:
            raise UserError(f"The classifier has no label '{label}'.", where=path, fix=f"one of: {', '.join(names)}")
        if label is None and len(names) > 1:
            raise UserError("The classifier has several labels.", where=path, fix=f"label: one of {', '.join(names)}")
        self.label = names[label] if label is not None else len(names) - 1
        if torch.cuda.is_available():
            self.model = self.model.to("cuda")

    @torch.no_grad()
    def log_odds(self, prompts: Sequence[Messages], completions: Sequence[str]) -> list[float]:
        """Log-odds of the label; the plain output where there is only one."""
        completions = [without_specials(self.tokenizer, text) for text in completions]
        # RoBERTa has two positions more than it can be shown tokens, which only its tokenizer says
        positions = getattr(self.model.config, "max_position_embeddings", None) or LONGEST
        longest = min(LONGEST, positions, self.tokenizer.model_max_length)
        batch = self.tokenizer(
            *self._shown(prompts, completions), add_special_tokens=not self._templated, padding=True, truncation=True,
            max_length=longest, return_tensors="pt",
        ).to(self.model.device)  # fmt: skip
        logits = self.model(**batch).logits.float()
        if logits.shape[-1] == 1 or self.model.config.problem_type == "multi_label_classification":
            return [float(value) for value in logits[:, self.label]]  # each label has a probability of its own
        logp = logits.log_softmax(-1)[:, self.label]
        return [float(value) for value in logp - torch.log1p(-logp.exp().clamp(max=1 - 1e-7))]

    @property
    def _templated(self) -> bool:
        return self.reads == "exchange" and bool(self.tokenizer.chat_template)

    def _shown(self, prompts: Sequence[Messages], completions: list[str]) -> list[list[str]]:
        """The texts, or both halves of each pair of texts."""
        if self.reads == "response":
            return [completions]
        if not self._templated:
            return [[plain_prompt(prompt[-1:]) for prompt in prompts], completions]
        turns = [[*prompt, {"role": "assistant", "content": said}]
                 for prompt, said in zip(prompts, completions, strict=True)]  # fmt: skip
        return [self.tokenizer.apply_chat_template(turns, tokenize=False)]
