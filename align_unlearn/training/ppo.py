"""`PPOTrainer`: policy, critic and reward on one base, the original being that base with adapters off.

TRL removed PPO; this one stands on the seam of its `GRPOTrainer`, which takes advantages of shape (B, T) from
subclasses. The critic is a second LoRA adapter with a value head. Each role's backward runs while its adapter is active
(`roles.py`): the value loss goes backward before the policy's forward begins, so that their gradients are those of two
separate models, with gradient checkpointing too.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer
from trl.trainer.utils import disable_dropout_in_model

from align_unlearn.modeling.forward import hidden_states
from align_unlearn.modeling.roles import original, role
from align_unlearn.modeling.scalar_head import head_for
from align_unlearn.training.advantages import (
    adapted_kl_coef,
    generalised_advantages,
    token_rewards,
    value_loss,
    whiten,
)
from align_unlearn.training.online import OnlineTrainer
from align_unlearn.training.online_configs import PPOConfig
from align_unlearn.training.optimizer import give_own_rate

CRITIC = "critic"
VALUE_HEAD = "value_head.safetensors"
Batch = dict[str, Any]


class PPOTrainer(OnlineTrainer, GRPOTrainer):  # type: ignore[misc]
    """Proximal policy optimisation with a critic (Schulman et al. 2017, arXiv:1707.06347).

    Args: as `OnlineTrainer`; `args` is a `PPOConfig`.
    """

    args: PPOConfig

    def __init__(self, model: Any, args: PPOConfig, *, peft_config: Any, **settings: Any) -> None:
        super().__init__(model, args, peft_config=peft_config, **settings)
        self.kl_coef = args.kl_coef
        self.model.add_adapter(CRITIC, deepcopy(peft_config))
        if args.disable_dropout:
            disable_dropout_in_model(self.model)
        self.model.value_head = head_for(self.model)
        self._enable_critic()

    def critic_parameters(self) -> list[Tensor]:
        """The critic's adapter and the value head."""
        adapter = [value for name, value in self.model.named_parameters() if f".{CRITIC}." in name]
        return [*adapter, *self.model.value_head.parameters()]

    def values(self, input_ids: Tensor, attention_mask: Tensor, tokens: int) -> Tensor:
        """V of the state before each of the last `tokens` tokens; call it in the critic's role. (B, tokens)"""
        model = self.accelerator.unwrap_model(self.model)
        with self.accelerator.autocast():
            hidden = hidden_states(model, input_ids, attention_mask)
        found: Tensor = model.value_head(hidden[:, -tokens - 1 : -1])
        return found

    def _generate_and_score_completions(self, inputs: list[Batch]) -> Batch:
        """TRL's rollouts, with advantages a token, values and returns in place of a group's advantage."""
        batch: Batch = super()._generate_and_score_completions(inputs)
        ids, mask = _whole(batch)
        said = batch["completion_mask"]
        tokens = said.shape[1]
        with torch.no_grad():
            if "old_per_token_logps" not in batch:
                batch["old_per_token_logps"] = self._logps(ids, mask, tokens)
            with original(self.accelerator.unwrap_model(self.model)):
                ref_logps = self._logps(ids, mask, tokens)
            with role(self.accelerator.unwrap_model(self.model), CRITIC):
                parts = zip(torch.split(ids, self._rows), torch.split(mask, self._rows), strict=True)
                values = torch.cat([self.values(*part, tokens) for part in parts])
        scores = torch.tensor(self.scores, device=said.device)
        scores = scores - self.args.missing_eos_penalty * (~self._ended(batch)).float()
        rewards, kl = token_rewards(scores, batch["old_per_token_logps"], ref_logps, said, self.kl_coef)
        advantages, returns = generalised_advantages(rewards, values, said, gamma=self.args.gamma, lam=self.args.lam)
        batch |= {"values": values * said, "returns": returns}
        batch["advantages"] = whiten(advantages, said) if self.args.whiten_advantages else advantages
        self._note_rollouts(scores, kl, said, values, returns)
        return batch

    def _compute_loss(self, model: Any, inputs: Batch) -> Tensor:
        """The value loss goes backward here; returns the policy's loss and the retain term."""
        if not model.training:
            return super()._compute_loss(model, inputs)
        self.value_step(inputs)
        if self.state.global_step < self.args.critic_warmup_steps:
            return torch.zeros((), device=inputs["advantages"].device, requires_grad=True)
        return super()._compute_loss(model, inputs)

    def value_step(self, inputs: Batch) -> None:
        """Adds the gradient of the value loss of a mini-batch, in the critic's role."""
        ids, mask = _whole(inputs)
        said = inputs["completion_mask"]
        with role(self.accelerator.unwrap_model(self.model), CRITIC):
            values = self.values(ids, mask, said.shape[1])
            loss = value_loss(values, inputs["values"], inputs["returns"], said, self.args.cliprange_value)
            self.check_finite(loss)
            (self.args.vf_coef * loss / self.current_gradient_accumulation_steps).backward()
        self.note("value_loss", loss)

    def create_optimizer(self, model: Any = None) -> Any:
        """The critic has a learning rate of its own."""
        super().create_optimizer(model)
        rate = self.args.critic_learning_rate
        rate = self.args.learning_rate if rate is None else rate
        return give_own_rate(self.optimizer, self.critic_parameters(), rate)

    def _clip_grad_norm(self, model: Any) -> Any:
        """Policy and critic are clipped apart, as two models would be."""
        critic = self.critic_parameters()
        own = {id(parameter) for parameter in critic}
        policy = [each for each in model.parameters() if each.requires_grad and id(each) not in own]
        self.accelerator.clip_grad_norm_(critic, self.args.max_grad_norm)
        return self.accelerator.clip_grad_norm_(policy, self.args.max_grad_norm)

    def extra_state(self, checkpoint: Path) -> dict[str, Any]:
        """As for every online trainer; the value head in a file of its own."""
        self.model.value_head.save(checkpoint / VALUE_HEAD)
        return {**super().extra_state(checkpoint), "kl_coef": self.kl_coef}

    def load_extra_state(self, checkpoint: Path, state: dict[str, Any]) -> None:
        """Takes up where `extra_state` was taken."""
        super().load_extra_state(checkpoint, state)
        self.model.value_head.load(checkpoint / VALUE_HEAD)
        self.kl_coef = state["kl_coef"]
        self._enable_critic()

    @property
    def _rows(self) -> int:
        """Rows that go through a forward pass at once."""
        return int(self.args.per_device_train_batch_size)

    def _enable_critic(self) -> None:
        """PEFT freezes adapters that are not active; the optimiser must know the critic's. In fp32."""
        for parameter in self.critic_parameters():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)

    def _logps(self, ids: Tensor, mask: Tensor, tokens: int) -> Tensor:
        logps: Tensor = self._get_per_token_logps_and_entropies(self.model, ids, mask, tokens, batch_size=self._rows)[0]
        return logps

    def _ended(self, batch: Batch) -> Tensor:
        """Whether each completion says an EOS. (B,)"""
        ends = torch.tensor(self.eos_token_ids, device=batch["completion_ids"].device)
        ended: Tensor = (torch.isin(batch["completion_ids"], ends) & batch["completion_mask"].bool()).any(-1)
        return ended

    def _note_rollouts(self, scores: Tensor, kl: Tensor, said: Tensor, values: Tensor, returns: Tensor) -> None:
        if not self.model.training:
            return
        per_token = float(kl.sum() / said.sum().clamp(min=1))
        kept = said.bool()
        spread = returns[kept].var()
        self.note("kl", per_token)
        self.note("kl_coef", self.kl_coef)
        self.note("score", scores.mean())
        self.note("explained_variance", float(1 - (returns - values)[kept].var() / spread.clamp(min=1e-8)))
        self._metrics["train"].pop("frac_reward_zero_std", None)  # there are no groups
        warm = self.state.global_step >= self.args.critic_warmup_steps
        if self.args.kl_target is not None and warm:
            self.kl_coef = adapted_kl_coef(
                self.kl_coef, per_token, self.args.kl_target, len(scores), self.args.kl_horizon
            )


def _whole(batch: Batch) -> tuple[Tensor, Tensor]:
    """Prompt and completion as one: ids and attention mask."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    return ids, torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
