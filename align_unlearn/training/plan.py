"""`plan`: what a run will take, before a weight is loaded.

Activations are counted, not guessed: one forward pass of the model without storage (PyTorch's meta device) over a batch
of the recipe's shape, adding up what autograd would keep for the backward pass. That holds for any architecture and any
LoRA setting. Everything else is arithmetic on shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from align_unlearn.config import BaseModelConfig
from align_unlearn.data.examples import Example
from align_unlearn.data.tokens import prompt_ids, tokenise
from align_unlearn.modeling.forward import hidden_states
from align_unlearn.modeling.lm_head import TILE
from align_unlearn.modeling.load import compute_dtype, lora_config
from align_unlearn.modeling.tokenizer import load_tokenizer
from align_unlearn.objectives.table import ONLINE, PREFERENCE, forget_objective
from align_unlearn.training.job import retain_term, weights_config
from align_unlearn.training.recipe import Recipe
from align_unlearn.training.rows import asked_rows, read_job_data

TILES = 5
"""Vocabulary-wide tensors alive at once in a tile of the exact KL: logits, probabilities of both models, gradient."""
MEMORY = ("weights", "adapter", "optimiser", "activations", "head", "holes")
BLOCK = 64
"""Weights that share one scale in NF4."""


HOLES = 0.25
"""Share of the activations that a CPU run keeps as holes between them: measured, `benchmarks/results/plan.json`."""


@dataclass(frozen=True)
class Plan:
    """What a run takes. Memory in bytes; `total` is its peak beside Python and the libraries.

    Attributes:
        parameters: of the base.
        trainable: of the adapter.
        weights: the base as it is held.
        adapter: fp32 weights and gradients.
        optimiser: AdamW's two moments, fp32.
        activations: kept for the backward pass of one micro-batch.
        head: a tile of the LM head, and the dequantised copy of the largest layer.
        holes: freed memory that a CPU run keeps (`modeling/cpu.py`): each pass leaves the holes of its dequantised
            weights, partly filled with activations that stay, and a share of the activations. 0 on a GPU.
        total: the sum.
        tokens_per_step: of forget rows (chosen answers too) and retain rows, padding included.
        policy_forwards: passes of the policy in a micro-batch.
        original_forwards: passes of the original in a micro-batch.
        cache_bytes: what is stored on disk beforehand.
    """

    parameters: int
    trainable: int
    weights: int
    adapter: int
    optimiser: int
    activations: int
    head: int
    holes: int
    total: int
    tokens_per_step: int
    policy_forwards: int
    original_forwards: int
    cache_bytes: int

    def described(self) -> dict[str, int]:
        """As JSON."""
        return asdict(self)

    def table(self) -> str:
        """Lines of text."""
        memory = {name: getattr(self, name) for name in MEMORY}
        share = self.trainable / self.parameters
        return "\n".join(
            [
                f"{'parameters':<22}{self.parameters:>15,}",
                f"{'trainable':<22}{self.trainable:>15,}  ({share:.2%})",
                *(f"{name:<22}{_mib(size):>15}" for name, size in memory.items()),
                f"{'peak memory':<22}{_mib(self.total):>15}",
                f"{'tokens a step':<22}{self.tokens_per_step:>15,}",
                f"{'forwards':<22}{self.policy_forwards:>15}  of the policy, {self.original_forwards} of the original",
                f"{'disk for caches':<22}{_mib(self.cache_bytes):>15}",
            ]
        )


def plan(recipe: Recipe) -> Plan:
    """What `recipe` will take. Reads its data and its model's configuration; loads no weights.

    Raises:
        UserError: data, settings or model do not fit.
    """
    shapes = batch_shapes(recipe)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(weights_config(recipe), trust_remote_code=recipe.args.trust_remote_code)
    parameters = sum(each.numel() for each in base.parameters())
    held = held_bytes(base, recipe.model)
    dtype = compute_dtype(recipe.model)
    model = with_adapter(base.to(dtype), recipe.model)
    trainable = sum(each.numel() for each in model.parameters() if each.requires_grad)
    trainable *= 2 if recipe.job.objective == "ppo" else 1  # the critic has an adapter of its own
    config = base.config.get_text_config()
    activations = sum(saved_bytes(model, *shape) for shape in shapes.micro_batch)
    if recipe.args.gradient_checkpointing:
        # one layer at a time, and what goes into each
        layers, inputs = config.num_hidden_layers, sum(rows * width for rows, width in shapes.micro_batch)
        activations = activations // layers + inputs * layers * config.hidden_size * dtype.itemsize
    head = TILES * TILE * config.vocab_size * 4 + held.largest
    holes = int(HOLES * activations) + len(shapes.micro_batch) * held.dequantised
    holes = 0 if torch.cuda.is_available() else holes
    policy, original = online_forwards(recipe) if recipe.job.objective in ONLINE else forwards(recipe)
    hidden = shapes.retain_positions * config.hidden_size * dtype.itemsize
    caches = (hidden if recipe.args.cache_ref_hidden else 0) + 4 * shapes.forget_positions
    adapter, optimiser = 8 * trainable, 8 * trainable
    return Plan(
        parameters,
        trainable,
        held.weights,
        adapter,
        optimiser,
        activations,
        head,
        holes,
        held.weights + adapter + optimiser + activations + head + holes,
        sum(rows * width for rows, width in shapes.micro_batch) * recipe.args.gradient_accumulation_steps,
        policy,
        original,
        caches,
    )


@dataclass(frozen=True)
class Shapes:
    """Batch shapes of a run: (rows, width) of each forward that keeps a graph, and labelled positions in all."""

    micro_batch: list[tuple[int, int]]
    forget_positions: int
    retain_positions: int


def batch_shapes(recipe: Recipe) -> Shapes:
    """The shapes that the recipe's data gives. An answer that is still to be sampled counts as long as it may be."""
    job, size = recipe.job, recipe.args.per_device_train_batch_size
    tokenizer = load_tokenizer(recipe.model.model_name_or_path or "")
    data = read_job_data(job, tokenizer, retain_term=retain_term(recipe) != "none")

    def lengths(examples: Sequence[Example], chosen: bool = False) -> list[tuple[int, int]]:
        found = []
        for each in examples:
            prompt = len(prompt_ids(tokenizer, each))
            text = (
                each.chosen or (data.refusals[0] if data.refusals else each.completion) if chosen else each.completion
            )
            answer = job.answer_tokens + 1
            if text is not None:
                answer = len(tokenise(tokenizer, each, text, max_length=None).completion_ids)
            found.append((prompt + answer, answer))
        return found

    def widest(rows: list[tuple[int, int]]) -> int:
        """The mean over batches of the longest of a batch, taken from the upper end to be on the safe side."""
        ordered = sorted(width for width, _ in rows)
        return ordered[min(len(ordered) - 1, int(len(ordered) * size / (size + 1)))]

    forget, retain = lengths(data.forget), lengths([*data.retain])
    shapes = []
    if job.objective in ONLINE:
        args: Any = recipe.args
        asked = [len(prompt_ids(tokenizer, each)) for rows in asked_rows(data, args).values() for each in rows]
        shapes = [(size, max(asked) + args.max_completion_length)]
        if retain:
            shapes.append((args.retain_batch_size, widest(retain)))
        return Shapes(shapes, 0, sum(answer for _, answer in retain))
    if job.objective in PREFERENCE:
        pairs = [*forget, *lengths(data.neighbours), *lengths(data.forget, chosen=True)]
        shapes.append((2 * size if job.objective == "dpo" else size, widest(pairs)))
    else:
        retain += lengths(data.neighbours)
        shapes.append((size, widest(forget)))
        if forget_objective(job.objective).chosen:
            shapes.append((size, widest(lengths(data.forget, chosen=True))))
    if retain:
        shapes.append((size, widest(retain)))
    return Shapes(shapes, sum(answer for _, answer in forget), sum(answer for _, answer in retain))


def online_forwards(recipe: Recipe) -> tuple[int, int]:
    """Passes of the policy (PPO's critic included) and of the original in a micro-batch, rollouts and rewards apart."""
    args: Any = recipe.args
    name, term = recipe.job.objective, retain_term(recipe)
    scored = 1 if name in ("ppo", "rloo") else 0  # log-probabilities as the tokens were sampled
    policy = 1 + scored + int(term != "none") + (2 if name == "ppo" else 0)
    original = int(name == "ppo" or bool(args.beta)) + int(term != "none" and not args.cache_ref_hidden)
    return policy, original


def forwards(recipe: Recipe) -> tuple[int, int]:
    """Passes of the policy and of the original in a micro-batch."""
    args: Any = recipe.args
    name, term = recipe.job.objective, retain_term(recipe)
    held_by_drift = bool(args.max_drift) or (args.max_drift is None and term in ("kl", "kl+nll"))
    kept_near = term != "none" and (held_by_drift or term in ("kl", "kl+nll", "js", "hidden"))
    retained = int(kept_near and not (args.cache_ref_hidden and term != "hidden"))
    policy = 1 + int(term != "none")
    if name in PREFERENCE:
        return policy + int(name == "kto"), retained + (0 if args.precompute_ref_log_probs else 1)
    entry = forget_objective(name)
    policy += int(entry.chosen and name != "jensun")
    looks = (1 + int(entry.chosen)) * int(entry.reference and not args.precompute_ref_log_probs)
    return policy, retained + looks + int(entry.distils)


def with_adapter(base: Any, config: BaseModelConfig) -> Any:
    """The base on the meta device with its adapter, fp32 as it is trained."""
    from peft import get_peft_model

    model = get_peft_model(base, lora_config(config))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model.train()


@dataclass(frozen=True)
class Held:
    """Bytes of the base's weights as they are held; of its largest quantised layer and of all of them, dequantised."""

    weights: int
    largest: int
    dequantised: int


def held_bytes(base: Any, config: BaseModelConfig) -> Held:
    """What the base's weights take in the precision asked for."""
    dtype = compute_dtype(config)
    quantised = {name for name, each in base.named_modules() if isinstance(each, nn.Linear)} - {"lm_head"}
    total, sizes = 0.0, [0]
    for name, parameter in base.named_parameters():
        count = parameter.numel()
        if name.removesuffix(".weight") not in quantised or not (config.load_in_4bit or config.load_in_8bit):
            total += count * dtype.itemsize
            continue
        sizes.append(count * dtype.itemsize)
        scales = count / BLOCK * (1 if config.use_bnb_nested_quant else 4)
        total += count if config.load_in_8bit else count / 2 + scales
    return Held(int(total), max(sizes), sum(sizes))


def saved_bytes(model: Any, rows: int, width: int) -> int:
    """What autograd keeps of one forward pass over (rows, width) tokens, weights left out.

    Args:
        model: with adapters, on the meta device.
    """
    own = {each.untyped_storage()._cdata for each in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    ids = torch.zeros(rows, width, dtype=torch.long, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # as transformers makes it of a padded batch; a mask of ones would be looked into, and there are no values here
        hidden_states(model, ids, torch.ones(rows, 1, width, width, dtype=torch.bool, device="meta"))
    return sum(int(storage.nbytes()) for storage in kept.values())


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
