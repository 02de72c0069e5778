"""`survive`: for every mode, precision and rounding asked for, what would be left, before anything is shipped.

Each export is made in memory, as it would compute when served, and held against the adapter model and the original.
LLM.int8 rounds activations as well, in each server's own kernels: here it is taken by its weights alone.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from align_unlearn import judge
from align_unlearn.audit import answers, likelihood, statistics
from align_unlearn.audit.earlier import jobs_of
from align_unlearn.audit.sets import audited_sets
from align_unlearn.audit.subjects import Subject, open_subjects, read_settings
from align_unlearn.config import Job
from align_unlearn.data.examples import Example
from align_unlearn.data.sources import read_rows
from align_unlearn.errors import UserError, unknown_name
from align_unlearn.export import answer_states, calibration, made_up, mixed, rounded, targets, tuning
from align_unlearn.export import effect as effect_of
from align_unlearn.export import moments as moments_of
from align_unlearn.export import survival as survived
from align_unlearn.export.calibration import Calibration, calibration_texts
from align_unlearn.export.effect import Effect, effect
from align_unlearn.export.gguf_file import as_embedding
from align_unlearn.export.mixed import mixed_codes
from align_unlearn.export.moments import moments
from align_unlearn.export.packed import GGUF
from align_unlearn.export.rounded import (
    ROUNDINGS,
    Codes,
    as_rounded,
    check_rounding,
    compensated_codes,
    default_rounding,
    nearest_codes,
    roundings_of,
)
from align_unlearn.export.survival import survival
from align_unlearn.export.targets import ADAPTER, MODES, target_of
from align_unlearn.export.tuning import tuned_scales, wanted_states
from align_unlearn.files import check_folder, sha256_of, sha256_of_file, write_json
from align_unlearn.modeling import forward, generate, grid, plain, rounding, tokenizer
from align_unlearn.modeling.grid import GRIDS, grid_of
from align_unlearn.modeling.load import DTYPES, weights_fingerprint
from align_unlearn.modeling.plain import adapted, plain_copy
from align_unlearn.modeling.round_trip import linear_layers, vocabulary_tables
from align_unlearn.run_dir import SCHEMA_VERSION, RunDir, versions


@dataclass(frozen=True)
class Export:
    """One way of shipping: mode, precision (or a dtype), rounding."""

    mode: str
    precision: str
    rounding: str

    @property
    def name(self) -> str:
        """In words."""
        rounding = f", {self.rounding}" if self.precision in GRIDS else ""
        return f"{self.mode} → {self.precision}{rounding}"


MEASURING_CODE = (
    answer_states, answers, calibration, effect_of, forward, generate, grid, judge, likelihood, made_up, mixed,
    moments_of, plain, rounded, rounding, statistics, survived, targets, tokenizer, tuning,
)  # fmt: skip
"""Changed, they give other figures."""
FLOATS = {**DTYPES, "f16": torch.float16}
"""Precisions in which nothing is chosen; F16 is GGUF's."""
EVERY = (
    Export("dequantised", "bfloat16", "nearest"),
    *(Export("dequantised", kind, each) for kind in ("int8", "nf4", "q4_0") for each in roundings_of(kind)),
)
"""What is asked where nothing is named."""


def exports_of(modes: Sequence[str], precisions: Sequence[str], roundings: Sequence[str] = ()) -> list[Export]:
    """Every combination that differs; where no rounding is named, today's practice and what `merge` does.

    Raises:
        UserError: a name is unknown, or no rounding that is named is one of a precision.
    """
    if ADAPTER in modes:
        raise UserError("The adapter alone is the adapter model: there is nothing to be lost.", where="--mode adapter",
                        fix=f"one of: {', '.join(MODES)}")  # fmt: skip
    for names, known, option in ((modes, MODES, "--mode"), (precisions, [*FLOATS, *GRIDS], "--precision"),
                                 (roundings, ROUNDINGS, "--rounding")):  # fmt: skip
        for name in names:
            if name not in known:
                raise unknown_name(option.removeprefix("--"), name, known, where=option)
    return [Export(mode, precision, each) for mode in modes for precision in precisions
            for each in _roundings(precision, roundings)]  # fmt: skip


def _roundings(precision: str, named: Sequence[str]) -> list[str]:
    """Those of the named that the precision knows; the only one, where it knows no other."""
    known = roundings_of(precision)
    if len(known) == 1 or not named:
        return list(dict.fromkeys(["nearest", default_rounding(precision)]))
    found = [each for each in named if each in known]
    if not found:
        check_rounding(precision, named[0])
    return found


def survive(
    run_path: str | Path,
    exports: Iterable[Export] = EVERY,
    *,
    out: str | Path | None = None,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Measures exports and writes `survival.json`.

    What was measured before of this adapter on these rows stays in the file and is not measured again.

    Args:
        run_path: a finished run.
        exports: to be measured.
        out: the folder; `RUN/survival` where none is given.
        trust_remote_code: run code that comes with the model.
        say: called with a line for each.

    Raises:
        UserError: the run is not finished, or its base is another.
    """
    run = RunDir.finished(run_path)
    job, config = read_settings(run.path)
    folder = Path(out) if out else run.path / "survival"
    check_folder(folder)
    subjects = open_subjects(run.path, trust_remote_code=trust_remote_code)
    candidate = subjects["candidate"]
    sets = audited_sets(job, candidate.tokenizer)
    earlier = jobs_of(config.after or [])
    codes = _Codes(job, subjects, sets, earlier)
    measured_on = _measured_on(candidate, [job, *earlier], sets)
    found = _found_before(folder / "survival.json", measured_on)
    for export in exports:
        if any(asdict(export).items() <= each.items() for each in found):
            say(f"{export.name}: measured before")
            continue
        began, worked = time.monotonic(), time.process_time()
        target = target_of(export.mode, candidate.model, config, trust_remote_code=trust_remote_code)
        model, effects = _exported(target, candidate.model, export, codes)
        worked = time.process_time() - worked
        named = sha256_of([candidate.sha256, asdict(export), weights_fingerprint(model)])
        served = Subject("control", model, candidate.tokenizer, export.name, export.precision, named)
        kept = survival(subjects, served, sets, max_new_tokens=job.audit_tokens)
        say(f"{export.name}: {kept.line()}")
        found.append(
            {**asdict(export), "name": export.name, **kept.described(), "seconds": time.monotonic() - began,
             "cpu_seconds_to_make": worked,
             "calibrated_on_audited_rows": export.rounding != "nearest" and codes.calibration.audited,
             "layers": {name: asdict(each) for name, each in effects.items()}}
        )  # fmt: skip
        write_json(folder / "survival.json", _summary(run, measured_on, found))
    return folder / "survival.json"


def _measured_on(candidate: Subject, jobs: Sequence[Job], sets: Mapping[str, Sequence[Example]]) -> str:
    """A hash of all that a figure depends on: model, rows, and the code that rounds and measures."""
    rows = {group: [[each.prompt, each.completion] for each in own] for group, own in sets.items()}
    sources = [source for job in jobs for source in (job.forget_dataset, job.neighbour_dataset, job.retain_dataset)]
    calibrated = [[row.columns for row in read_rows(source)] for source in sources if source]
    code = [sha256_of_file(Path(str(module.__file__))) for module in MEASURING_CODE]
    return sha256_of([candidate.sha256, rows, calibrated, jobs[0].audit_tokens, code])


def _found_before(file: Path, measured_on: str) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    try:
        known = json.loads(file.read_text("utf-8"))
    except ValueError:
        return []
    return list(known["exports"]) if known.get("measured_on") == measured_on else []


class _Codes:
    """Codes of the exports of one run; what those that follow each other begin with is made once."""

    def __init__(
        self,
        job: Job,
        subjects: Mapping[str, Subject],
        sets: Mapping[str, Sequence[Example]],
        earlier: Sequence[Job],
    ) -> None:
        self.job, self.subjects, self.sets, self.earlier = job, subjects, sets, earlier
        self._inputs: tuple[str, dict[str, torch.Tensor]] = ("", {})
        self._begun: tuple[tuple[str, str], Codes] = (("", ""), {})

    @functools.cached_property
    def calibration(self) -> Calibration:
        """The texts that all of them are calibrated on."""
        return calibration_texts(self.job, self.subjects, self.sets, self.earlier)

    @functools.cached_property
    def wanted(self) -> list[torch.Tensor]:
        """What the adapter model makes of them."""
        return wanted_states(plain_copy(self.subjects["candidate"].model, torch.float32), self.calibration.texts)

    def of(self, export: Export, target: Any) -> Codes:
        """The codes of the target's layers in this export."""
        mode, precision = export.mode, export.precision
        if export.rounding == "nearest":
            return nearest_codes(target, precision)
        if self._inputs[0] != mode:
            self._inputs = mode, moments(target, self.calibration.texts)
        if self._begun[0] != (mode, precision):
            base = self.subjects["candidate"].model
            self._begun = (mode, precision), compensated_codes(target, base, precision, self._inputs[1])
        begun = self._begun[1]
        if export.rounding == "compensated":
            return begun
        if export.rounding == "mixed":
            begun = mixed_codes(target, self.subjects["candidate"].model, precision, self._inputs[1], begun)
        return tuned_scales(target, self.wanted, begun, self.calibration.texts)


def _exported(target: Any, peft_model: Any, export: Export, codes: _Codes) -> tuple[Any, dict[str, Effect]]:
    """The model as it would compute, and what is left of the update in each layer."""
    updates = _updates(peft_model)
    if export.precision in FLOATS:
        dtype = FLOATS[export.precision]
        before = _rounded_without(target, updates, lambda weight: weight.to(dtype).float())
        for parameter in target.parameters():
            if parameter.ndim > 1 or export.precision != "f16":  # GGUF files keep norms whole
                parameter.data = parameter.data.to(dtype).float()
        return target, _effects(before, target, updates)
    before = _rounded_without(target, updates, lambda weight: _nearest(weight, export.precision))
    chosen = codes.of(export, target)
    served = as_rounded(target, chosen)
    if export.precision in GGUF:
        _round_embeddings(served, chosen)
    return served, _effects(before, served, updates)


@torch.no_grad()
def _round_embeddings(model: Any, codes: Codes) -> None:
    """As GGUF files hold them, and the LM head, where they have no codes."""
    for name, own in vocabulary_tables(model).items():
        if name not in codes:
            own.weight.copy_(as_embedding(own.weight))


def _nearest(weight: torch.Tensor, precision: str) -> torch.Tensor:
    grid = grid_of(weight, precision)
    return weight if grid is None else grid.nearest(weight)[1]


def _updates(peft_model: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """By linear layer, the update and the matrix whose rows span its rows."""
    found = {}
    for name, layer in adapted(peft_model).items():
        if not hasattr(layer, "parameter_name"):
            adapters = [each for each in peft_model.active_adapters if each in layer.lora_A]
            update = torch.stack([layer.get_delta_weight(each).detach().float() for each in adapters]).sum(0)
            found[name.removesuffix(".weight")] = (
                update,
                torch.cat([layer.lora_A[each].weight.detach().float() for each in adapters]),
            )
    return found


def _rounded_without(
    target: Any,
    updates: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    rounded: Callable[[torch.Tensor], torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Q(W) of every layer that has an update, of the weights that this mode ships."""
    layers = linear_layers(target)
    return {name: rounded(layers[name].weight.detach().float() - update) for name, (update, _) in updates.items()}


def _effects(
    before: Mapping[str, torch.Tensor], exported: Any, updates: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
) -> dict[str, Effect]:
    after = linear_layers(exported)
    return {name: effect(before[name], after[name].weight.detach().float(), update, rows)
            for name, (update, rows) in updates.items()}  # fmt: skip


def _summary(run: RunDir, measured_on: str, found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    manifest = run.manifest()
    return {
        "schema_version": SCHEMA_VERSION,
        "run": str(run.path),
        "adapter_sha256": manifest.get("adapter_sha256"),
        "base": manifest["base"],
        "seed": manifest.get("seed"),
        "command": survive_command(str(run.path), found),
        "measured_on": measured_on,
        "exports": list(found),
        "libraries": versions(),
    }


def survive_command(run: str, exports: Sequence[Mapping[str, Any]]) -> str:
    """The command that measures these exports, and those between them."""
    options = [f"--{key} {value}" for key in ("mode", "precision", "rounding")
               for value in dict.fromkeys(str(each[key]) for each in exports)]  # fmt: skip
    return " ".join(["align-unlearn survive", run, *options])


def table(exports: Sequence[Mapping[str, Any]]) -> str:
    """What `survival.json` says, as lines of text."""
    lines = [f"{'export':<40}{'forgetting':>11}{'utility':>9}{'KL retain':>11}{'leak':>7}{'same':>7}"]
    for each in exports:
        lines.append(
            f"{each['name']:<40}{_say(each['forgetting_kept'], '.0%'):>11}{_say(each['utility_kept'], '.0%'):>9}"
            f"{_say(each['kl_retain'], '.3f'):>11}{_say(each['export']['leak'], '.0%'):>7}"
            f"{_say(each['same_tokens'], '.0%'):>7}{'' if each['survived'] else '   does not survive'}"
        )
    return "\n".join(lines)


def _say(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
