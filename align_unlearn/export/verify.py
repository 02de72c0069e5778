"""Is the written folder the same model? Loaded afresh, without PEFT, and held against the adapter model."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from align_unlearn.audit.answers import verdict_on
from align_unlearn.audit.sets import audited_sets
from align_unlearn.config import Job
from align_unlearn.data.batches import pad_texts
from align_unlearn.data.tokens import prompt_ids
from align_unlearn.errors import Refused
from align_unlearn.modeling.forward import hidden_states
from align_unlearn.modeling.generate import generate
from align_unlearn.modeling.lm_head import LMHead, kl_divergence
from align_unlearn.modeling.load import keep_differentiable
from align_unlearn.modeling.roles import evaluating

MAX_KL = {torch.float32: 1e-3, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Mean KL(adapter model ‖ written model), nats a token, that a merge may cost, by the coarser dtype of the two.

Adapter and base round apart in the one and together in the other: in bf16 that alone is 0.004 nats a token on
SmolLM2-135M, whatever the written dtype. A merge that loses the update costs ten times as much and more.
"""
SAME_VERDICTS = {torch.float32: 1.0, torch.float16: 0.95, torch.bfloat16: 0.9}
"""Share of verdicts that must be the same, likewise."""
PROMPTS = 8
NEW_TOKENS = 24


@dataclass(frozen=True)
class Parity:
    """How closely the written folder agrees with the adapter model.

    Attributes:
        kl: mean KL(adapter model ‖ written model), nats a token, on prompts and the adapter model's greedy answers.
        tokens: over how many tokens.
        same_answers: share of greedy answers that are the same to the token.
        same_verdicts: share of answers with the same verdict.
        prompts: over how many prompts.
    """

    kl: float
    tokens: int
    same_answers: float
    same_verdicts: float
    prompts: int

    def described(self) -> dict[str, float]:
        """As the manifest holds it."""
        return asdict(self)


def require_parity(
    model: Any, tokenizer: Any, folder: Path, dtype: torch.dtype, job: Job, *, trust_remote_code: bool = False
) -> Parity:
    """Compares the folder with the adapter model on the audited prompts.

    Raises:
        Refused: the folder does not load, its KL is above `MAX_KL`, or too many verdicts changed.
    """
    parity = compare(model, tokenizer, folder, dtype, job, trust_remote_code)
    coarser = max(dtype, model.get_input_embeddings().weight.dtype, key=MAX_KL.__getitem__)
    most = MAX_KL[coarser]
    if not parity.kl <= most or parity.same_verdicts < SAME_VERDICTS[coarser]:
        raise Refused(
            f"The merged model is not the model that was trained: KL {parity.kl:.2e} nats a token (at most {most}), "
            f"{parity.same_verdicts:.0%} of verdicts the same.",
            where=str(folder),
            fix="write it with --dtype float32; nothing was left at the destination",
        )
    return parity


@torch.no_grad()
def compare(
    model: Any, tokenizer: Any, folder: Path, dtype: torch.dtype, job: Job, trust_remote_code: bool = False
) -> Parity:
    """The agreement of an adapter model and a written folder, on the audited prompts."""
    try:
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, RuntimeError) as error:
        why = str(error).splitlines()[0]
        raise Refused(f"The written folder does not load: {why}", where=str(folder)) from error
    plain = plain.to(model.device).eval()
    keep_differentiable(plain)
    reloaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    sets = audited_sets(job, tokenizer)
    rows = [(group, each) for group in sets for each in sets[group][:PROMPTS]]
    prompts = [prompt_ids(tokenizer, each) for _, each in rows]
    if [prompt_ids(reloaded, each) for _, each in rows] != prompts:
        raise Refused("The written tokenizer does not render the same prompts.", where=str(folder))
    with evaluating(model):
        ours = generate(model, tokenizer, prompts, max_new_tokens=NEW_TOKENS, title="adapter model")
        theirs = generate(plain, reloaded, prompts, max_new_tokens=NEW_TOKENS, title="written model")
        kl, tokens = _mean_kl(model, plain, [(p, a.ids) for p, a in zip(prompts, ours, strict=True)])
    verdicts = [
        verdict_on(group, row, one.text) == verdict_on(group, row, other.text)
        for (group, row), one, other in zip(rows, ours, theirs, strict=True)
    ]
    same = [one.ids == other.ids for one, other in zip(ours, theirs, strict=True)]
    return Parity(kl, tokens, sum(same) / len(same), sum(verdicts) / len(verdicts), len(rows))


def _mean_kl(model: Any, plain: Any, rows: list[tuple[list[int], list[int]]]) -> tuple[float, int]:
    total, count = 0.0, 0
    head, ref_head = LMHead.of(plain), LMHead.of(model)
    for start in range(0, len(rows), 8):
        batch = pad_texts([prompt + answer for prompt, answer in rows[start : start + 8]], model.device)
        mask = batch["attention_mask"].bool()
        ours = hidden_states(model, batch["input_ids"], batch["attention_mask"])[mask]
        theirs = hidden_states(plain, batch["input_ids"], batch["attention_mask"])[mask]
        kl = kl_divergence(ours, theirs, head, ref_head=ref_head)
        total, count = total + float(kl.sum()), count + int(kl.numel())
    return (max(0.0, total / count) if math.isfinite(total) else math.nan), count
