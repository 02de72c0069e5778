"""Peak memory of PPO with every role on one 4-bit base, against four models of their own, at the same batch.

    python benchmarks/ppo_memory.py            (make bench-ppo)

Both sides roll out, score and update on the same prompts, each in a process of its own; what Python, the libraries and
the data take before a model is loaded is not counted. The four models are what PPO took before: policy, value, reward
and reference, each with weights of its own (policy and value with LoRA, in bf16 and, to be fair, in 4 bits too). The
loss is the same. Writes `results/ppo_memory.json`.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results/ppo_memory.json"
MODEL, ROWS, TOKENS = "smollm2-135m", 8, 24
SIDES = {
    "one 4-bit base, four roles": "ours",
    "four models, bf16": "bfloat16",
    "four models, 4 bits each": "nf4",
    "four models, fp32": "float32",
}


def prompts() -> list[dict[str, Any]]:
    """Prompts of the shipped corpus."""
    from align_unlearn.data.examples import read_examples

    return [
        {"prompt": each.prompt, "kind": "forget", "reference": None} for each in read_examples("builtin:harmful@train")
    ]


def ours(folder: str) -> None:
    """Two optimiser steps of `PPOTrainer`: policy, critic and reward adapters on one NF4 base."""
    from datasets import Dataset

    from align_unlearn import BaseModelConfig, PPOConfig, PPOTrainer, load_base, load_tokenizer
    from align_unlearn.modeling.load import lora_config

    config = BaseModelConfig(model_name_or_path=MODEL, dtype="bfloat16")
    rewards = {"safe": {"model": "classifier", "kwargs": {"path": "runs/reward"}}}
    args = PPOConfig(
        output_dir=folder, rewards=rewards, retain="none", max_steps=2, per_device_train_batch_size=ROWS,
        steps_per_generation=1, max_completion_length=TOKENS, save_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = PPOTrainer(
        load_base(config),
        args,
        train_dataset=Dataset.from_list(prompts()),
        processing_class=load_tokenizer(MODEL),
        peft_config=lora_config(config),
    )
    trainer.train()


def four(precision: str) -> None:
    """Two PPO steps by hand with four models: the same rollouts, losses and optimiser."""
    import torch
    from peft import get_peft_model

    from align_unlearn import BaseModelConfig, load_base, load_tokenizer
    from align_unlearn.data.examples import Example
    from align_unlearn.data.tokens import prompt_ids
    from align_unlearn.modeling.generate import generate
    from align_unlearn.modeling.load import lora_config
    from align_unlearn.training.advantages import generalised_advantages, token_rewards, value_loss, whiten

    quantised = precision == "nf4"
    config = BaseModelConfig(
        model_name_or_path=MODEL, load_in_4bit=quantised, dtype="bfloat16" if quantised else precision
    )
    tokenizer = load_tokenizer(MODEL)
    policy = get_peft_model(load_base(config), lora_config(config))
    critic = get_peft_model(load_base(config), lora_config(config))
    reward, reference = load_base(config).eval(), load_base(config).eval()
    width = policy.config.hidden_size
    value_head, reward_head = (torch.nn.Linear(width, 1) for _ in range(2))
    trained = [each for model in (policy, critic) for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW([*trained, *value_head.parameters()], lr=1e-4)
    rows = [prompt_ids(tokenizer, Example(row["prompt"], None, "", "")) for row in prompts()]

    def states(model: Any, ids: Any, mask: Any) -> Any:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        return base.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state

    def logps(model: Any, ids: Any, mask: Any) -> Any:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=TOKENS + 1).logits[:, :-1]
        return logits.float().log_softmax(-1).gather(-1, ids[:, -TOKENS:, None])[..., 0]

    for step in range(2):
        asked = rows[step * ROWS : (step + 1) * ROWS]
        said = generate(policy, tokenizer, asked, max_new_tokens=TOKENS, temperature=1.0, seed=step)
        longest, pad = max(map(len, asked)), tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(p)) + p + a.ids + [pad] * (TOKENS - len(a.ids))
                            for p, a in zip(asked, said, strict=True)])  # fmt: skip
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * (len(p) + len(a.ids)) + [0] * (TOKENS - len(a.ids))
                             for p, a in zip(asked, said, strict=True)])  # fmt: skip
        on = mask[:, -TOKENS:]
        with torch.no_grad():
            before, ref = logps(policy, ids, mask), logps(reference, ids, mask)
            values = value_head(states(critic, ids, mask)[:, -TOKENS - 1 : -1].float())[..., 0]
            scores = reward_head(states(reward, ids, mask)[:, -1].float())[:, 0]
        rewards, _ = token_rewards(scores, before, ref, on, 0.05)
        advantages, returns = generalised_advantages(rewards, values, on, gamma=1.0, lam=0.95)
        advantages = whiten(advantages, on)
        ratio = (logps(policy, ids, mask) - before).exp()
        surrogate = torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        now = value_head(states(critic, ids, mask)[:, -TOKENS - 1 : -1].float())[..., 0]
        loss = -(surrogate * on).sum() / on.sum() + 0.5 * value_loss(now, values, returns, on, 0.2)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def measure(side: str) -> None:
    """Runs one side in this process and prints its peak resident size less that of the libraries, in bytes."""
    import resource

    import torch  # noqa: F401

    import align_unlearn.training.ppo  # noqa: F401
    from align_unlearn.modeling.memory import peak_memory

    prompts()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if side == "ours":
        with tempfile.TemporaryDirectory() as folder:
            ours(folder)
    else:
        four(side)
    print(json.dumps({"libraries": before, "peak": peak_memory() - before}))


def main() -> None:
    """Measures every side and writes the result."""
    found = []
    for name, side in SIDES.items():
        done = subprocess.run(
            [sys.executable, __file__, side], stdout=subprocess.PIPE, text=True, check=True
        ).stdout.splitlines()
        found.append({"side": name, **json.loads(done[-1])})
        print(f"{name}: {found[-1]['peak'] / 2**20:.0f} MiB", flush=True)
    for each in found:
        each["ours_over_this"] = found[0]["peak"] / each["peak"]
    RESULT.write_text(
        json.dumps({"rows": ROWS, "tokens": TOKENS, "model": MODEL, "sides": found}, indent=2) + "\n", "utf-8"
    )


if __name__ == "__main__":
    measure(sys.argv[1]) if len(sys.argv) > 1 else main()
