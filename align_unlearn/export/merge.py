"""Merging: an adapter and its base become the model that is served, in the precision that is served, or nothing does.

A merge into NF4 codes changes none of them: an unlearning update is far smaller than half a quantisation step, so that
the model as it was comes back. Here every layer is de-quantised in fp32 (exactly what the adapter was trained on), the
update is added in fp32, and what is then rounded is rounded so that the update stays (`rounded.py`). The written folder
is loaded afresh and asked; one in which the forgotten comes back is refused.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align_unlearn.audit.earlier import jobs_of, requests_of
from align_unlearn.audit.sets import audited_sets
from align_unlearn.audit.subjects import Subject, open_subjects, read_settings, served_subject
from align_unlearn.config import BaseModelConfig, Job
from align_unlearn.data.examples import Example
from align_unlearn.errors import Refused, UserError
from align_unlearn.export.calibration import Calibration, calibration_texts
from align_unlearn.export.card import model_card
from align_unlearn.export.checks import (
    check_converter,
    check_free,
    check_options,
    check_read_back,
    check_room,
    kept_beneath,
)
from align_unlearn.export.formats import FORMATS, Shipment
from align_unlearn.export.gguf_file import check_family
from align_unlearn.export.packed import GGUF
from align_unlearn.export.passed_on import pass_on_generation_config, pass_on_tokenizer
from align_unlearn.export.published import (
    Options,
    dtype_of_run,
    export_manifest,
    published_recipe,
    stop_where_the_tokenizer_does,
)
from align_unlearn.export.rounded import Codes, default_rounding, rounded_layers
from align_unlearn.export.serving_check import PROMPTS, Served, check_serving
from align_unlearn.export.stream import can_stream
from align_unlearn.export.survival import FORGETTING, UTILITY, Survival, has_kept, survival
from align_unlearn.export.targets import ADAPTER, check_mode, target_of
from align_unlearn.export.verify import Parity, require_parity
from align_unlearn.files import new_folder, write_json, write_text
from align_unlearn.modeling.adapter_file import read_updates
from align_unlearn.modeling.embedded import hub_name
from align_unlearn.modeling.load import DTYPES, held_as
from align_unlearn.modeling.plain import plain_copy
from align_unlearn.run_dir import RunDir


@dataclass(frozen=True)
class Merged:
    """What was written, and how closely it is what was trained.

    Attributes:
        folder: the destination.
        parity: with the adapter model; none for quantised exports and for the adapter alone.
        survival: of the forgetting; none for the adapter alone, which is what was trained.
    """

    folder: Path
    parity: Parity | None
    survival: Survival | None


def merge(
    run_path: str | Path,
    to: str | Path,
    *,
    mode: str = "dequantised",
    precision: str | None = None,
    rounding: str | None = None,
    dtype: str | None = None,
    scale: float = 1.0,
    adapters: Sequence[str] | None = None,
    converter: str | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = print,
) -> Merged:
    """Writes the run's model at `to`, once it has been shown that it still is that model.

    Args:
        run_path: a finished run.
        to: a new or empty folder; nothing is left there if the merge fails.
        mode: `dequantised` (the base as it was trained on, plus the update), `original16` (its own 16-bit weights, plus
            the update), or `adapter` (the adapter alone).
        precision: of `FORMATS`; where neither it nor a dtype is given, the one that the run was trained through.
        rounding: of `ROUNDINGS`; what the precision needs, where none is given.
        dtype: `float32`, `bfloat16` or `float16`, unquantised; the dtype that the run computed in, where none is given.
        scale: what the adapter's update is multiplied by (task arithmetic: less forgets less, more forgets more). What
            survives is held to the update as it was trained, so that half of it needs `force`.
        adapters: of a run on top of earlier ones, those whose updates go in beside its own; all, where none are named.
            One that is left out is a request withdrawn.
        converter: llama.cpp's `convert_hf_to_gguf.py`, for GGUF of families that are not written here.
        force: write what has not kept enough too, with that in card and manifest.
        trust_remote_code: run code that comes with the model.
        say: called with a line for each stage.

    Raises:
        UserError: the run is not finished, the base is another, the destination is not empty, there is no room, or an
            option is unknown.
        Refused: the written folder does not give the adapter model's answers, or too little of its forgetting.
    """
    if mode == ADAPTER and (scale != 1.0 or any((precision, rounding, dtype, adapters, converter))):
        raise UserError("The adapter alone is shipped as it is.", where="--mode adapter", fix="leave the others out")
    run = RunDir.finished(run_path)
    job, config = read_settings(run.path)
    precision = precision or (None if dtype else job.survive)
    check_options(mode, precision, rounding, dtype, scale)
    check_converter(converter, precision)
    if mode != ADAPTER:
        check_mode(mode, config)
    if adapters is not None:
        config = held_as(config, after=kept_beneath(run, config, adapters))
    written = precision or dtype or dtype_of_run(run, config)
    if rounding is None and written == job.survive:
        rounding = "nearest"  # what a run was trained through is the rounding that it was trained for
    rounding = rounding or default_rounding(written)
    options = Options(mode, written, rounding, scale, converter, trust_remote_code)
    target = Path(to)
    with new_folder(target) as folder:
        if mode == ADAPTER:
            check_free(sum(file.stat().st_size for file in run.adapter.glob("*")), target)
            _write_adapter(run, job, config, folder)
            say(f"adapter in {target}")
            return Merged(target, None, None)
        say(f"loading {run.adapter} on {config.model_name_or_path}")
        subjects = open_subjects(run.path, after=config.after, trust_remote_code=trust_remote_code)
        candidate = subjects["candidate"]
        sets = audited_sets(job, candidate.tokenizer)
        check_room(candidate.model.get_base_model(), written, target, converter)
        if written in GGUF and converter is None:
            check_family(candidate.model.get_base_model(), candidate.tokenizer)
        stop_where_the_tokenizer_does(candidate.model.get_base_model(), candidate.tokenizer)
        shipment, seen = _shipment(subjects, job, config, run, options, sets, say)
        say(f"writing {FORMATS[written].about}")
        FORMATS[written].write(shipment, folder)
        held = Counter(grid.kind for grid, _ in (shipment.codes or {}).values())
        del shipment  # its weights in fp32, and codes
        if not list(folder.glob("*.gguf")):  # which holds tokenizer and template itself
            pass_on_tokenizer(config, candidate.tokenizer, folder)
            pass_on_generation_config(config, folder)
        write_text(folder / "recipe.yaml", published_recipe(run))
        manifest = export_manifest(run, config, options, folder) | {
            "calibrated_on_audited_rows": seen,
            "weights_by_precision": dict(held),
        }
        write_json(folder / "manifest.json", manifest)
        say("loading the written folder afresh and asking it what the adapter model was asked")
        parity, kept, served = _checked(subjects, sets, folder, manifest, job, force, trust_remote_code)
        earlier = {
            name: _earlier(name, request, folder, manifest, force, trust_remote_code, say)
            for name, request in requests_of(config.after or []).items()
        }
        say(kept.line())
        manifest |= {
            "parity": None if parity is None else parity.described(),
            "survival": kept.described(),
            "serving": served.described(),
            "earlier": {name: None if each is None else described_earlier(each) for name, each in earlier.items()},
        }
        write_json(folder / "manifest.json", manifest)
        write_text(folder / "README.md", model_card(run, manifest, parity, kept, earlier))
    say(f"merged model in {target}")
    return Merged(target, parity, kept)


def _shipment(
    subjects: dict[str, Subject],
    job: Job,
    config: BaseModelConfig,
    run: RunDir,
    options: Options,
    sets: Mapping[str, Sequence[Example]],
    say: Callable[[str], None],
) -> tuple[Shipment, bool]:
    """What is to be written, and whether its rounding has seen audited rows."""
    candidate, trust = subjects["candidate"], options.trust_remote_code
    mode, precision = options.mode, options.precision
    updates = read_updates(run.adapter, options.scale) if precision in DTYPES else None
    if can_stream(candidate.model.get_base_model(), config, updates):
        return Shipment(config, candidate.tokenizer, mode, candidate.model, updates, None, None, None, trust), False
    with scaled_update(candidate.model, options.scale):
        target = target_of(mode, candidate.model, config, trust_remote_code=trust)
    codes: Codes | None = None
    calibration = Calibration([], audited=False)
    if FORMATS[precision].blocks:
        say(f"rounding to {precision}, {options.rounding}")
        if options.rounding != "nearest":
            calibration = calibration_texts(job, subjects, sets, jobs_of(config.after or []))
        dtype = next(target.parameters()).dtype
        adapter = target if mode == "dequantised" else plain_copy(candidate.model, dtype)
        codes = rounded_layers(target, candidate.model, adapter, precision, options.rounding, calibration.texts)
    return Shipment(
        config, candidate.tokenizer, mode, candidate.model, None, target, codes, options.converter, trust
    ), calibration.audited


def _checked(
    subjects: dict[str, Subject],
    sets: dict[str, Any],
    folder: Path,
    manifest: dict[str, Any],
    job: Job,
    force: bool,
    trust_remote_code: bool,
) -> tuple[Parity | None, Survival, Served]:
    """Parity and survival of what was written, and how it serves without us.

    Raises:
        Refused: it is not the model that was trained, or too little of its forgetting is left.
    """
    candidate, parity = subjects["candidate"], None
    if manifest["precision"] in DTYPES and manifest["mode"] == "dequantised" and manifest["scale"] == 1.0:
        parity = require_parity(
            candidate.model, candidate.tokenizer, folder, DTYPES[manifest["dtype"]], job,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
    export = served_subject("control", folder, manifest, trust_remote_code)
    if manifest["precision"] in GGUF:
        check_read_back(export.model, candidate.model.get_base_model())
    kept = survival(subjects, export, sets, max_new_tokens=job.audit_tokens)
    if not kept.survived and not force:
        raise Refused(
            f"What was forgotten does not survive this export, or what was kept does not: {kept.line()} "
            f"(at least {FORGETTING:.0%} and {UTILITY:.0%} are asked for).",
            where=str(folder.parent),
            fix="--rounding tuned, a finer --precision, or --force to write it with this in card and manifest",
        )
    rows = [(group, row) for group, own in sets.items() for row in own[: PROMPTS // len(sets) + 1]]
    served = check_serving(
        folder, export, candidate.tokenizer, rows, manifest["dtype"], trust_remote_code=trust_remote_code
    )
    return parity, kept, served


def _earlier(
    name: str,
    request: Path | None,
    folder: Path,
    manifest: dict[str, Any],
    force: bool,
    trust_remote_code: bool,
    say: Callable[[str], None],
) -> Survival | None:
    """What of an earlier request is left in what was written, beside that request's own original; none without its run.

    Raises:
        Refused: too little of its forgetting.
    """
    if request is None:
        say(f"the request of the earlier adapter {name} is not asked: it lies in no run")
        return None
    job, _ = read_settings(request)
    subjects = open_subjects(request, trust_remote_code=trust_remote_code)
    forget = {"forget": audited_sets(job, subjects["base"].tokenizer)["forget"]}
    export = served_subject("control", folder, manifest, trust_remote_code)
    kept = survival(subjects, export, forget, max_new_tokens=job.audit_tokens)
    say(f"the earlier request {request}: {kept.line()}")
    if not has_kept(kept.forgetting_kept) and not force:
        raise Refused(
            f"The earlier request comes back in this export: {kept.line()}.",
            where=str(request),
            fix="--rounding tuned, a finer --precision, or --force; --adapters without it withdraws the request",
        )
    return kept


def described_earlier(kept: Survival) -> dict[str, Any]:
    """As the manifest holds it: an earlier request is asked about its forgetting alone, and judged by that."""
    return kept.described() | {"survived": has_kept(kept.forgetting_kept)}


def _write_adapter(run: RunDir, job: Job, config: BaseModelConfig, folder: Path) -> None:
    if job.survive:
        raise UserError(f"This adapter has only ever spoken through {job.survive}, which is no part of it.",
                        where="--mode adapter", fix="merge it")  # fmt: skip
    if config.after:
        raise UserError("This adapter stands on others, which a folder of PEFT's cannot say.", where="--mode adapter",
                        fix="merge it, or ship every run's adapter")  # fmt: skip
    shutil.copytree(run.adapter, folder, dirs_exist_ok=True)
    own = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    base = run.manifest()["base"]
    write_json(folder / "adapter_config.json", own | {"base_model_name_or_path": hub_name(base["name"])})
    write_text(folder / "recipe.yaml", published_recipe(run))
    alone = Options(ADAPTER, ADAPTER, "nearest", scale=1.0, converter=None, trust_remote_code=False)
    manifest = export_manifest(run, config, alone, folder)
    write_json(folder / "manifest.json", manifest)
    write_text(folder / "README.md", model_card(run, manifest, None, None, {}))


@contextlib.contextmanager
def scaled_update(model: Any, scale: float) -> Iterator[None]:
    """Within the block, the update of every LoRA layer is multiplied: W + s·ΔW."""
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    before = [module.scaling for module in layers]
    for module in layers:
        module.scaling = {adapter: scale * value for adapter, value in module.scaling.items()}
    try:
        yield
    finally:
        for module, own in zip(layers, before, strict=True):
            module.scaling = own
