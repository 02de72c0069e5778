"""Who is examined: the base, the candidate, and (where there is one) a control that never saw the forget set.

An adapter and its base share one set of weights; an exported folder is loaded on its own, in the precision it is
served in, and compared with the base that its manifest names.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from torch import Tensor

from align_unlearn.config import BaseModelConfig, Job
from align_unlearn.data.examples import Example, Messages
from align_unlearn.errors import UserError
from align_unlearn.files import sha256_of, sha256_of_folder
from align_unlearn.modeling.earlier import standing_on
from align_unlearn.modeling.forward import hidden_states
from align_unlearn.modeling.lm_head import LMHead
from align_unlearn.modeling.load import (
    base_fingerprint,
    folder_fingerprint,
    held_as,
    load_base,
    load_gguf,
    pinned,
    precision_name,
)
from align_unlearn.modeling.plain import plain_copy
from align_unlearn.modeling.roles import evaluating, original
from align_unlearn.modeling.through_quantiser import train_through
from align_unlearn.modeling.tokenizer import load_tokenizer
from align_unlearn.run_dir import RunDir, is_run, read_manifest

SERVED = ("*.safetensors", "*.gguf", "config.json", "generation_config.json", "tokenizer*.json", "*.jinja")
"""What of an exported folder makes its answers; its manifest and its card do not."""


@dataclass(frozen=True)
class Subject:
    """A model under examination.

    Attributes:
        name: `base`, `candidate` or `control`.
        model: its weights; the base of an adapter shares them with the candidate.
        path: where it was loaded from.
        precision: as it was loaded.
        sha256: names weights, adapter and precision together; answers are cached under it.
        adapters_off: it speaks with the adapters of `model` off.
        beneath: of the earlier runs beneath `model`, so many count; all, where none is given.
        guard: a system prompt that its deployment puts before a conversation; likelihood is read without it.
    """

    name: str
    model: Any
    tokenizer: Any
    path: str
    precision: str
    sha256: str
    adapters_off: bool = field(default=False)
    guard: str | None = None
    beneath: int | None = None

    @contextlib.contextmanager
    def speaking(self) -> Iterator[Any]:
        """The model as this subject, in evaluation mode and without gradient."""
        with standing_on(self.model, self.beneath):
            if self.adapters_off:
                with original(self.model) as model:
                    yield model
            else:
                with evaluating(self.model) as model, torch.no_grad():
                    yield model

    def plain(self, dtype: torch.dtype) -> Any:
        """A plain copy of the model as this subject."""
        with standing_on(self.model, self.beneath):
            return plain_copy(self.model, dtype, adapters_off=self.adapters_off)

    def guarded(self, messages: Messages) -> Messages:
        """A conversation as the deployment passes it on: behind the guard, where it has no system prompt already."""
        if self.guard is None or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self.guard}, *messages]

    def asked(self, example: Example) -> Example:
        """The example as the deployment passes it on."""
        return example if isinstance(example.prompt, str) else replace(example, prompt=self.guarded(example.prompt))

    def hidden(self, batch: dict[str, Tensor]) -> Tensor:
        """(B, T, H) final hidden states."""
        on_device = {name: value.to(self.model.device) for name, value in batch.items()}
        with self.speaking() as model:
            return hidden_states(model, on_device["input_ids"], on_device["attention_mask"])

    @property
    def head(self) -> LMHead:
        """Its LM head."""
        return LMHead.of(self.model)

    def described(self) -> dict[str, str]:
        """What the audit says of it."""
        return {"path": self.path, "sha256": self.sha256, "precision": self.precision}


def read_settings(path: str | Path) -> tuple[Job, BaseModelConfig]:
    """Job and model of a run's or an export's `recipe.yaml`.

    Raises:
        UserError: there is none.
    """
    file = Path(path) / "recipe.yaml"
    if not file.is_file():
        raise UserError(
            "There is no recipe.yaml beside the model, so it is not known what to examine.", where=str(path)
        )
    known = yaml.safe_load(file.read_text("utf-8"))
    return _of(Job, known), _of(BaseModelConfig, known)


def open_subjects(
    target: str | Path,
    control: str | None = None,
    *,
    base: str | None = None,
    guard: str | None = None,
    after: Sequence[str] | None = None,
    request: str | Path | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Subject]:
    """The subjects of an audit, by name; `base` and `candidate` always, `control` where one is named.

    Args:
        target: a run folder, a folder that `merge` wrote, an adapter of PEFT, or any causal LM (a folder or a hub id).
        control: a model that never saw the forget set.
        base: what the target was made from, where the target does not say it itself.
        guard: a system prompt that the candidate's deployment puts before every conversation.
        after: of a run on top of earlier ones, those that stay beneath it; all, where none are named.
        request: a run beneath the target, whose original is the base in place of the target's own.
        trust_remote_code: run code that comes with the models; never taken from the folder's own recipe.

    Raises:
        UserError: it is not known what the target was made from, its base is not the one it was trained on, or a model
            does not load.
    """
    path = Path(target)
    dtype = None
    if (path / "manifest.json").is_file() and (path / "recipe.yaml").is_file():
        _, config = read_settings(path)
        dtype, manifest = config.dtype, read_manifest(path)
        if is_run(path):
            subjects = _run_subjects(path, config, manifest, trust_remote_code, after)
        else:
            subjects = _export_subjects(path, config, manifest, request, trust_remote_code)
    elif (path / "adapter_config.json").is_file():
        subjects = _adapter_subjects(path, base, trust_remote_code)
    else:
        subjects = _model_subjects(str(target), base, trust_remote_code)
    if request is not None and is_run(path):
        subjects["base"] = _original_of(request, config, subjects["candidate"], trust_remote_code)
    if guard:
        subjects["candidate"] = replace(subjects["candidate"], guard=guard)
    if control:
        plain = BaseModelConfig(model_name_or_path=control, load_in_4bit=False, dtype=dtype or "auto")
        subjects["control"] = _plain_subject("control", plain, trust_remote_code)
    for subject in subjects.values():
        check_vocabulary(subjects["base"], subject)
    return subjects


def check_vocabulary(base: Subject, other: Subject) -> None:
    """Refuses a model whose tokens are not the base's: texts are read, and drift is measured, token by token.

    Raises:
        UserError: its LM head has another width, or a token has another number.
    """
    widths = [subject.model.get_output_embeddings().weight.shape[0] for subject in (base, other)]
    known = other.tokenizer.get_vocab()
    moved = [token for token, number in base.tokenizer.get_vocab().items() if known.get(token) != number]
    if widths[0] != widths[1] or moved:
        why = f"the token {moved[0]!r} has another number" if moved else f"{widths[1]} tokens, the base {widths[0]}"
        raise UserError(
            f"The {other.name} has another vocabulary than the base: {why}.",
            where=other.path,
            fix="compare it with the model that it was made from",
        )


def load_adapter(run: RunDir, config: BaseModelConfig, *, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """The base with the run's adapter on it, and the tokenizer.

    Args:
        run: a finished run.
        config: of its base.
        trust_remote_code: run code that comes with the model.

    Raises:
        UserError: the base is not the one the adapter was trained on, or the adapter does not fit it.
    """
    check_base(run.manifest(), config)
    return _on_base(run.adapter, run.manifest().get("adapter_sha256"), config, trust_remote_code)


def _on_base(adapter: Path, sha256: str | None, config: BaseModelConfig, trust_remote_code: bool) -> tuple[Any, Any]:
    from peft import PeftModel

    check_adapter(adapter, sha256)
    base = load_base(config, trust_remote_code=trust_remote_code)
    try:
        model = PeftModel.from_pretrained(base, str(adapter))
    except (RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(
            f"The adapter does not fit the base: {str(error).splitlines()[0]}", where=str(adapter)
        ) from error
    return model.eval(), load_tokenizer(str(adapter), trust_remote_code=trust_remote_code)


def check_adapter(folder: Path, sha256: str | None = None) -> None:
    """Refuses an adapter that is not there (PEFT would look for it on the hub), or that has changed since its run.

    Raises:
        UserError: as said.
    """
    if not any((folder / f"adapter_model.{kind}").is_file() for kind in ("safetensors", "bin")):
        raise UserError(
            "The adapter's weights are missing.", where=str(folder), fix="restore adapter_model.safetensors"
        )
    if sha256 and sha256_of_folder(folder) != sha256:
        raise UserError("The adapter's weights are not those that the run wrote.", where=str(folder),
                        fix="restore them, or train again")  # fmt: skip


def check_base(manifest: dict[str, Any], config: BaseModelConfig) -> None:
    """Refuses a base that is not the one that was trained on.

    Raises:
        UserError: it is not there, or its weights hash differently.
    """
    expected = manifest.get("base", {}).get("sha256")
    if expected and base_fingerprint(config) != expected:
        raise UserError(
            "The base model is not the one this adapter was trained on: it is not there, or its weights differ.",
            where=f"{config.model_name_or_path} (a path is taken from where you run)",
            fix="restore the base that manifest.json names, or train again",
        )


def _run_subjects(
    path: Path,
    config: BaseModelConfig,
    manifest: dict[str, Any],
    trust_remote_code: bool,
    after: Sequence[str] | None = None,
) -> dict[str, Subject]:
    run = RunDir.finished(path)
    check_base(manifest, config)
    config, known = _standing_on(config, manifest, after)
    model, tokenizer = _on_base(run.adapter, manifest.get("adapter_sha256"), config, trust_remote_code)
    if through := read_settings(path)[0].survive:  # it has only ever spoken through this rounding
        train_through(model, through)
    return _with_and_without(model, tokenizer, path, run.adapter, config, known)


def _with_and_without(
    model: Any, tokenizer: Any, path: Path, adapter: Path, config: BaseModelConfig, known: str
) -> dict[str, Subject]:
    """Candidate and base on one model, whose base's weights hash to `known`."""
    precision = precision_name(config)
    base = sha256_of([known, precision])
    named = sha256_of([base, folder_fingerprint(adapter)])
    name = str(config.model_name_or_path)
    return {
        "base": Subject("base", model, tokenizer, name, precision, base, adapters_off=True),
        "candidate": Subject("candidate", model, tokenizer, str(path), f"{precision} + adapter", named),
    }


def _original_of(request: str | Path, config: BaseModelConfig, later: Subject, trust_remote_code: bool) -> Subject:
    """The original of a run beneath a later one: the later one's own weights with fewer earlier runs beneath them.

    Loaded on its own where it is held in another precision.
    """
    own, known = read_settings(request)[1], read_manifest(Path(request))["base"]["sha256"]
    count, precision = len(own.after or []), precision_name(own)
    beneath = held_as(config, after=(config.after or [])[:count])
    if precision != precision_name(config) or known != base_fingerprint(beneath):
        return open_subjects(request, trust_remote_code=trust_remote_code)["base"]
    return replace(later, name="base", path=str(own.model_name_or_path), precision=precision, adapters_off=True,
                   sha256=sha256_of([known, precision]), beneath=count, guard=None)  # fmt: skip


def _export_subjects(
    path: Path, config: BaseModelConfig, manifest: dict[str, Any], request: str | Path | None, trust_remote_code: bool
) -> dict[str, Subject]:
    if manifest["mode"] == "adapter":  # shipped alone: the base is held as it was trained on
        check_base(manifest, config)
        model, tokenizer = _on_base(path, manifest["run"]["sha256"], config, trust_remote_code)
        return _with_and_without(model, tokenizer, path, path, config, manifest["base"]["sha256"])
    served = served_subject("candidate", path, manifest, trust_remote_code)
    if request is not None:
        return {"base": open_subjects(request, trust_remote_code=trust_remote_code)["base"], "candidate": served}
    check_base(manifest, config)
    # requests that were withdrawn are not in the base that this is compared with
    config, known = _standing_on(config, manifest, manifest.get("after"))
    named = sha256_of([known, precision_name(config)])
    base = _plain_subject("base", config, trust_remote_code, sha256=named)
    return {"base": base, "candidate": served}


def _standing_on(
    config: BaseModelConfig, manifest: dict[str, Any], after: Sequence[str] | None
) -> tuple[BaseModelConfig, str]:
    """The base with those earlier adapters beneath it, and its fingerprint: the manifest's where all of them stay."""
    if after is None or list(after) == (config.after or []):
        return config, str(manifest["base"]["sha256"])
    config = held_as(config, after=list(after))
    return config, base_fingerprint(config)


def served_subject(name: str, path: Path, manifest: dict[str, Any], trust_remote_code: bool) -> Subject:
    """An exported folder as it is served: unquantised, pre-quantised, or a GGUF file.

    Raises:
        UserError: it does not load.
    """
    precision = manifest.get("precision", manifest["dtype"])
    parts = [sha256_of_folder(path, pattern) for pattern in SERVED]
    sha256 = sha256_of([*parts, precision, manifest["dtype"]])
    if files := sorted(path.glob("*.gguf")):
        model, tokenizer = load_gguf(files[0])
        return Subject(name, model, tokenizer, str(path), precision, sha256)
    config = BaseModelConfig(model_name_or_path=str(path), load_in_4bit=False, dtype=manifest["dtype"])
    return replace(_plain_subject(name, config, trust_remote_code, sha256=sha256), precision=precision)


def _adapter_subjects(path: Path, base: str | None, trust_remote_code: bool) -> dict[str, Subject]:
    """An adapter of anyone's: its base with it, and without."""
    from peft import PeftConfig, PeftModel

    check_adapter(path)
    name = base or PeftConfig.from_pretrained(str(path)).base_model_name_or_path
    config = BaseModelConfig(model_name_or_path=name, load_in_4bit=False)
    plain = _plain_subject("base", config, trust_remote_code)
    try:
        model = PeftModel.from_pretrained(plain.model, str(path)).eval()
        if model.active_peft_config.is_prompt_learning:
            raise UserError("An adapter of prompts is not audited: texts are read without it.", where=str(path))
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(
            f"The adapter does not fit the base: {str(error).splitlines()[0]}", where=str(path), fix="--base NAME"
        ) from error
    sha256 = sha256_of([plain.sha256, folder_fingerprint(path)])
    return {
        "base": replace(plain, model=model, adapters_off=True),
        "candidate": replace(plain, name="candidate", model=model, path=str(path), sha256=sha256),
    }


def _model_subjects(target: str, base: str | None, trust_remote_code: bool) -> dict[str, Subject]:
    """Any causal LM beside what it was made from."""
    if base is None:
        raise UserError(
            "It is not known what this model was made from, so there is nothing to compare it with.",
            where=target,
            fix="--base NAME, the model as it was before (the model itself, if nothing was done to it)",
        )
    before = _plain_subject("base", BaseModelConfig(model_name_or_path=base, load_in_4bit=False), trust_remote_code)
    if target == base:
        return {"base": before, "candidate": replace(before, name="candidate")}
    config = BaseModelConfig(model_name_or_path=target, load_in_4bit=False)
    return {"base": before, "candidate": _plain_subject("candidate", config, trust_remote_code)}


def _plain_subject(
    name: str, config: BaseModelConfig, trust_remote_code: bool, *, sha256: str | None = None
) -> Subject:
    where = str(config.model_name_or_path)
    precision = precision_name(config)
    config = pinned(config)
    model = load_base(config, trust_remote_code=trust_remote_code).eval()
    sha256 = sha256 or sha256_of([base_fingerprint(config), precision])
    tokenizer = load_tokenizer(where, revision=config.model_revision, trust_remote_code=trust_remote_code)
    return Subject(name, model, tokenizer, where, precision, sha256)


def _of(kind: Any, known: dict[str, Any]) -> Any:
    names = {entry.name for entry in fields(kind)}
    return kind(**{name: value for name, value in known.items() if name in names})
