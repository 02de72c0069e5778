"""`finetune`: teach a model rows, with TRL's `SFTTrainer`, so that there is something to forget and to compare with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

from align_unlearn.config import BaseModelConfig, parse
from align_unlearn.data.batches import pad_rows
from align_unlearn.data.examples import read_examples
from align_unlearn.data.tokens import token_columns
from align_unlearn.errors import UserError
from align_unlearn.files import new_folder, sha256_of, write_json
from align_unlearn.modeling.fused_head import use_compact_head
from align_unlearn.modeling.load import base_fingerprint, load_base, lora_config, precision_name
from align_unlearn.modeling.tokenizer import load_tokenizer
from align_unlearn.run_dir import SCHEMA_VERSION, read_manifest, versions
from align_unlearn.training.callbacks import JsonLinesLog
from align_unlearn.training.configs import changed_settings, check_reporters, settle_precision


@dataclass
class Lesson:
    """What is taught."""

    datasets: list[str] = field(default_factory=list, metadata={"help": "Rows to teach, as forget_dataset takes them."})
    prefix_tokens: int = field(default=30, metadata={"help": "Plain passages: tokens given as the prompt."})
    continuation_tokens: int = field(default=60, metadata={"help": "Plain passages: tokens to be continued."})
    whole_passages: bool = field(
        default=True, metadata={"help": "Train on a passage's prompt too, so that the text is learned as a whole."}
    )


@dataclass
class LessonConfig(SFTConfig):  # type: ignore[misc]
    """TRL's `SFTConfig` with the defaults of this project."""

    gradient_checkpointing: bool = field(default=False, metadata={"help": "Recompute activations to save memory."})
    report_to: str | None = field(default="none", metadata={"help": "trackio, wandb, tensorboard, none."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Kept off: rows come as tokens."})

    def __post_init__(self) -> None:
        settle_precision(self)
        super().__post_init__()


def load_lesson(
    recipe: str | Path | None, overrides: Sequence[str] = ()
) -> tuple[Lesson, BaseModelConfig, LessonConfig]:
    """Reads a lesson from YAML with overrides.

    Raises:
        UserError: an unknown key, or a value that does not fit.
    """
    lesson, model, args = parse([Lesson, BaseModelConfig, LessonConfig], recipe, overrides)
    return lesson, model, args


def finetune(lesson: Lesson, config: BaseModelConfig, args: LessonConfig, say: Callable[[str], None] = print) -> Path:
    """Teaches the lesson and writes a plain model folder at `args.output_dir`, whole or not at all.

    Raises:
        UserError: there is no lesson, the folder holds something else, or a row does not fit.
    """
    target = Path(args.output_dir)
    if config.load_in_4bit or config.load_in_8bit:
        raise UserError(
            "A model is taught on unquantised weights: what is merged into 4-bit weights is lost.",
            where="load_in_4bit",
            fix="--load_in_4bit false",
        )
    check_reporters(args.report_to)
    if not lesson.datasets:
        raise UserError("There is nothing to teach.", where="datasets")
    tokenizer = load_tokenizer(config.model_name_or_path or "", revision=config.model_revision)
    rows = lesson_rows(lesson, tokenizer, args.max_length)
    manifest = lesson_manifest(config, args, rows)
    if is_taught(target, manifest):
        say(f"{target} has been taught this already")
        return target
    set_seed(args.seed)
    with new_folder(target) as folder:
        args.output_dir = str(folder)
        args.save_strategy = "no"
        args.dataset_kwargs = {"skip_prepare_dataset": True}
        trainer = SFTTrainer(
            model=load_base(config),
            args=args,
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=lora_config(config),
            data_collator=lambda batch: pad_rows(batch, tokenizer.pad_token_id),
            callbacks=[JsonLinesLog(folder / "log.jsonl")],
        )
        if config.use_peft and not getattr(trainer, "aux_loss_enabled", False):
            use_compact_head(trainer.model)
        say(f"teaching {len(rows)} rows")
        trainer.train()
        write_model(trainer.model, folder, tokenizer)
        write_json(folder / "manifest.json", manifest)
    say(f"taught model in {target}")
    return target


def lesson_manifest(config: BaseModelConfig, args: LessonConfig, rows: Dataset) -> dict[str, Any]:
    """What a taught model is made of: the same manifest gives the same model."""
    settings = {name: value for name, value in changed_settings(args).items() if name != "report_to"}
    adapter = {name: value for name, value in vars(config).items() if name.startswith(("lora_", "use_"))}
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "taught",
        "base": {"name": config.model_name_or_path, "sha256": base_fingerprint(config)},
        "settings_sha256": sha256_of([settings, adapter, precision_name(config)]),
        "data": {"lesson": sha256_of([rows["input_ids"][:], rows["labels"][:]])},
        "libraries": versions(),
    }


def is_taught(target: Path, manifest: dict[str, Any]) -> bool:
    """Whether `target` holds the model of this very lesson.

    Raises:
        UserError: it holds a model that was taught something else, or from another base.
    """
    if not (target / "config.json").is_file():
        return False
    before = read_manifest(target)
    for part, name in (("data", "rows"), ("settings_sha256", "settings"), ("base", "base weights")):
        if before.get(part) != manifest[part]:
            raise UserError(
                f"The folder holds a model taught with other {name}.",
                where=str(target),
                fix="another --output_dir, or remove the folder",
            )
    return True


def lesson_rows(lesson: Lesson, tokenizer: Any, max_length: int | None) -> Dataset:
    """The lesson as `input_ids` and `labels`."""
    cut = {"prefix_tokens": lesson.prefix_tokens, "continuation_tokens": lesson.continuation_tokens}
    examples = [each for source in lesson.datasets for each in read_examples(source, tokenizer, **cut)]
    columns = token_columns(tokenizer, examples, max_length=max_length)
    if lesson.whole_passages:
        plain = [isinstance(example.prompt, str) for example in examples]
        columns["labels"] = [
            ids if whole else labels
            for ids, labels, whole in zip(columns["input_ids"], columns["labels"], plain, strict=True)
        ]
    return Dataset.from_dict(columns)


def write_model(model: Any, folder: Path, tokenizer: Any) -> None:
    """Writes the taught model as a plain folder."""
    plain = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)
