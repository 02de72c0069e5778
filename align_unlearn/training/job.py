"""`train`: a recipe from its data to an adapter. The command line, the recipe scripts and Python callers share it."""

from __future__ import annotations

import contextlib
import inspect
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState, set_seed

from align_unlearn.errors import UserError
from align_unlearn.files import disk_errors, new_folder, sha256_of_folder
from align_unlearn.modeling.forward import layer_of_depth
from align_unlearn.modeling.load import (
    check_after,
    described_base,
    load_base,
    load_weights_config,
    lora_config,
    pinned,
    precision_name,
)
from align_unlearn.modeling.memory import peak_memory
from align_unlearn.modeling.roles import POLICY
from align_unlearn.modeling.through_quantiser import check_through, train_through
from align_unlearn.modeling.tokenizer import load_tokenizer
from align_unlearn.objectives.table import ONLINE, TRAINERS, forget_objective
from align_unlearn.run_dir import RunDir, is_done, versions
from align_unlearn.training.callbacks import JsonLinesLog, StopRules
from align_unlearn.training.checkpoints import last_whole_checkpoint, read_state
from align_unlearn.training.configs import RefusalDPOConfig, RefusalKTOConfig, UnlearnConfig, check_reporters
from align_unlearn.training.dpo import RefusalDPOTrainer
from align_unlearn.training.kto import RefusalKTOTrainer
from align_unlearn.training.online import OnlineTrainer
from align_unlearn.training.online_job import build_online_trainer, online_hashes
from align_unlearn.training.recipe import Recipe
from align_unlearn.training.rows import (
    JobData,
    read_job_data,
    refusal_rows,
    retain_rows,
    text_rows,
    with_own_answers,
    with_refusals,
)
from align_unlearn.training.unlearn import UnlearnTrainer

Trainer = UnlearnTrainer | RefusalDPOTrainer | RefusalKTOTrainer | OnlineTrainer


def train(recipe: Recipe, say: Callable[[str], None] = print) -> RunDir:
    """Runs a recipe, or takes it up where it was cut off, and returns its run folder.

    Args:
        recipe: from `load_recipe`.
        say: called with a line for each stage.

    Raises:
        UserError: data, settings or model do not fit; the run folder belongs to another run; the loss is not finite;
            the disk is full.
    """
    job, args = recipe.job, recipe.args
    run = RunDir(Path(args.output_dir))
    begun = {} if job.if_exists == "overwrite" else run.manifest()
    recipe = replace(recipe, model=pinned(recipe.model, begun))
    if getattr(args, "chat_template_path", None) or getattr(args, "eos_token", None):
        raise UserError(
            "The chat template and the EOS token belong to the model folder here, so that audit and export see them.",
            where="chat_template_path / eos_token",
            fix="put chat_template.jinja and tokenizer_config.json into the model's folder",
        )
    check_reporters(args.report_to)
    check_through(job.survive)
    check_after(recipe.model)
    tokenizer = load_tokenizer(
        recipe.model.model_name_or_path or "",
        revision=recipe.model.model_revision,
        trust_remote_code=args.trust_remote_code,
    )
    check_context(getattr(args, "max_length", None), recipe)
    check_layer(recipe)
    data = read_job_data(job, tokenizer, retain_term=retain_term(recipe) != "none")
    manifest = new_manifest(recipe, data)
    if is_done(run, manifest, job.if_exists):
        say(f"{run.path} is finished already; --if_exists overwrite runs it again")
        return run
    with disk_errors(run.path):
        run.path.mkdir(parents=True, exist_ok=True)
        run.write_manifest(manifest)
        recipe.write(run.recipe_path)
        say(f"loading {recipe.model.model_name_or_path} as {precision_name(recipe.model)}")
        set_seed(args.seed)
        model = load_base(recipe.model, trust_remote_code=args.trust_remote_code)
        data = with_own_answers(data, job, model, tokenizer, seed=args.seed, cache=run.own_answers_path)
        trainer = build_trainer(recipe, data, model, tokenizer)
        if job.survive:
            say(f"training through {job.survive}: {train_through(trainer.model, job.survive)} layers are rounded")
        trainer.add_callback(JsonLinesLog(run.log_path))
        checkpoint = last_whole_checkpoint(run.path)
        say(f"resuming from {checkpoint}" if checkpoint else f"training on {len(data.forget)} rows to forget")
        if checkpoint is None or not take_last_step(trainer, checkpoint):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        save_adapter(trainer, tokenizer, run)
    stopped = [rule.reason for rule in trainer.callback_handler.callbacks if isinstance(rule, StopRules)]
    run.write_manifest(
        manifest
        | {
            "status": "finished",
            "stopped_because": next((reason for reason in stopped if reason), "all steps done"),
            "steps": trainer.state.global_step,
            "peak_bytes": peak_memory(),
            "adapter_sha256": sha256_of_folder(run.adapter),
        }
    )
    say(f"adapter in {run.adapter}")
    return run


def take_last_step(trainer: Any, checkpoint: Path) -> bool:
    """Loads the checkpoint of a run that was killed after its last step, which transformers would train past.

    Returns:
        Whether it is one; if not, nothing was loaded.
    """
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    if state.global_step < state.max_steps and read_state(checkpoint)["stop_rules"]["reason"] is None:
        return False
    trainer._load_from_checkpoint(str(checkpoint))
    trainer.state = state
    return True


def check_context(max_length: int | None, recipe: Recipe) -> None:
    """Refuses rows longer than the model can read.

    Raises:
        UserError: `max_length` is beyond the model's context.
    """
    context = getattr(weights_config(recipe).get_text_config(), "max_position_embeddings", None)
    if context is not None and max_length is not None and max_length > context:
        raise UserError(
            f"max_length {max_length} is beyond the model's context of {context} tokens.",
            where="max_length",
            fix=f"--max_length {context}",
        )


def weights_config(recipe: Recipe) -> Any:
    """The configuration of the recipe's base, without its weights."""
    return load_weights_config(
        recipe.model.model_name_or_path or "",
        revision=recipe.model.model_revision,
        trust_remote_code=recipe.args.trust_remote_code,
    )


def check_layer(recipe: Recipe) -> None:
    """Refuses a layer that the model does not have, where the objective works at one.

    Raises:
        UserError: there is no such layer.
    """
    if not isinstance(recipe.args, UnlearnConfig):
        return
    parameter = inspect.signature(forget_objective(recipe.job.objective).loss).parameters.get("layer")
    if parameter is not None:
        depth = weights_config(recipe).get_text_config().num_hidden_layers
        layer_of_depth(depth, recipe.args.hyper_parameters().get("layer", parameter.default))


def build_trainer(recipe: Recipe, data: JobData, model: Any, tokenizer: Any) -> Trainer:
    """The trainer of a recipe, on data whose every row has a completion."""
    args: Any = recipe.args
    if recipe.job.objective in ONLINE:
        return build_online_trainer(recipe, data, model, tokenizer)
    common = {"processing_class": tokenizer, "peft_config": lora_config(recipe.model)}
    if isinstance(args, (RefusalDPOConfig, RefusalKTOConfig)):
        wordings = recipe.job.refusals_per_row
        rows = refusal_rows(data, tokenizer, args.max_length, seed=args.seed, refusals_per_row=wordings)
        kept = retain_rows(data.retain, tokenizer, args.max_length)
        if isinstance(args, RefusalKTOConfig):
            return RefusalKTOTrainer(model, args, train_dataset=rows, retain_dataset=kept, **common)
        return RefusalDPOTrainer(model, args, train_dataset=rows, retain_dataset=kept, **common)
    objective = recipe.job.objective
    chosen = forget_objective(objective).chosen
    if data.refusals:
        data = with_refusals(data, seed=args.seed)
    forget, kept = text_rows(data, tokenizer, args.max_length, chosen=chosen)
    return UnlearnTrainer(model, args, objective=objective, train_dataset=forget, retain_dataset=kept, **common)


def retain_term(recipe: Recipe) -> str:
    """The retain term that a recipe ends up with."""
    objective = recipe.job.objective
    default = "kl" if objective in TRAINERS else forget_objective(objective).retain
    return str(recipe.args.retain or default)


def new_manifest(recipe: Recipe, data: JobData) -> dict[str, Any]:
    """What a run is made of, before it has run."""
    base = described_base(recipe.model)
    return {
        "kind": "run",
        "status": "running",
        "base": base,
        "data": data.hashes() | online_hashes(recipe, base),
        "settings_sha256": recipe.identity(),
        "retain": retain_term(recipe),
        "seed": recipe.args.seed,
        "libraries": versions(),
    }


def save_adapter(trainer: Any, tokenizer: Any, run: RunDir) -> None:
    """Writes the adapter and the tokenizer, whole or not at all.

    The update is written `extrapolate` times as large as it was trained, and what an objective taught in order to
    subtract it (`negate`) with its sign turned.
    """
    if run.adapter.exists():
        shutil.rmtree(run.adapter)
    model = trainer.accelerator.unwrap_model(trainer.model)
    scale = trainer.args.extrapolate * (trainer.entry.sign if isinstance(trainer, UnlearnTrainer) else 1.0)
    with new_folder(run.adapter) as folder, scaled_adapter(model, scale):
        model.save_pretrained(folder, safe_serialization=True, selected_adapters=[POLICY])
        tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def scaled_adapter(model: Any, scale: float) -> Iterator[None]:
    """Within the block, the update of every LoRA layer is multiplied by `scale`, through its B matrix."""
    kept = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_B" in name:
                kept[name] = parameter.detach().clone()
                parameter.mul_(scale)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, before in kept.items():
                model.get_parameter(name).copy_(before)
