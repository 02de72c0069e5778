"""The model card of an export: what was forgotten, what it cost, and what is not known."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align_unlearn.export.serving import how_to_serve
from align_unlearn.export.survival import Survival, has_kept
from align_unlearn.export.verify import Parity
from align_unlearn.modeling.embedded import hub_name
from align_unlearn.modeling.load import DTYPES
from align_unlearn.run_dir import RunDir

NOT_ASKED = [
    "**This model was written without being loaded. Whether it has forgotten, and kept the rest, has not been "
    "measured:** `align-unlearn audit` on this folder, where it is served, does that.",
    "",
]


def model_card(
    run: RunDir,
    manifest: dict[str, Any],
    parity: Parity | None,
    kept: Survival | None,
    earlier: Mapping[str, Survival | None],
) -> str:
    """A card in the hub's format, from the run's manifest and its audit, if there is one."""
    base = manifest["base"]
    lines = [
        "---",
        f"base_model: {hub_name(base['name'])}",
        "library_name: transformers",
        "tags: [unlearning, align-unlearn]",
        "---",
        "",
        "# Unlearned model",
        "",
        *_what_it_is(manifest),
        "",
        *(NOT_ASKED if manifest.get("unchecked") else _agreement(parity, kept)),
        *_earlier_requests(earlier, manifest),
        "## Audit of the adapter model",
        "",
        *_audit_table(run),
        "",
        "## Limits",
        "",
        "What is reported is what was not recovered by the probes named, at their budget; it is not a proof of "
        "removal. Quantising this folder anew can bring the forgotten back: export the precision that is served.",
        "",
        "## Serve",
        "",
        *how_to_serve(manifest["precision"]),
        "",
        "## Reproduce",
        "",
        f"`align-unlearn train recipe.yaml` with the `recipe.yaml` of this folder, then `{_merge_command(manifest)}` "
        "on its run; versions are in `manifest.json`.",
        "",
    ]
    return "\n".join(lines)


def _what_it_is(manifest: dict[str, Any]) -> list[str]:
    base = manifest["base"]
    made = f"`{base['name']}` after unlearning with LoRA on a base held as {base['precision']}"
    if manifest["mode"] == "adapter":
        return [f"{made}: the adapter, to be loaded on that base held as it was trained on."]
    precision = manifest["precision"]
    rounding = f", rounding {manifest['rounding']}" if manifest["rounding"] else ""
    lines = [f"{made}, merged in fp32 ({manifest['mode']}), written as {precision}{rounding}."]
    held = manifest.get("weights_by_precision", {})
    if len(held) > 1:
        counts = ", ".join(f"{count} in {kind}" for kind, count in sorted(held.items()))
        lines += ["", f"Weights: {counts}, embeddings among them; the file is no larger than one of {precision} alone."]
    if manifest["scale"] != 1.0:
        lines += [
            "",
            f"**The update was multiplied by {manifest['scale']:g}: this is not the model that was audited.**",
        ]
    if manifest.get("withdrawn"):
        lines += ["", "**Earlier requests were withdrawn: the audit below is of the model with them.**"]
    return lines


def _merge_command(manifest: Mapping[str, Any]) -> str:
    precision, options = manifest["precision"], []
    if manifest["mode"] != "dequantised":
        options.append(f"--mode {manifest['mode']}")
    if precision != "adapter":
        options.append(f"--dtype {precision}" if precision in DTYPES else f"--precision {precision}")
    if manifest["rounding"]:
        options.append(f"--rounding {manifest['rounding']}")
    if manifest["scale"] != 1.0:
        options.append(f"--scale {manifest['scale']:g}")
    if manifest.get("withdrawn"):
        options += [f"--adapters THE_RUN_{Path(each).name}" for each in manifest["after"]] or ["--adapters RUN"]
    if manifest.get("converter"):
        options.append(f"--converter {manifest['converter']}")
    if manifest.get("unchecked"):
        options.append("--unchecked")
    return " ".join(["align-unlearn merge RUN --to FOLDER", *options])


def _agreement(parity: Parity | None, kept: Survival | None) -> list[str]:
    lines = []
    if parity is not None:
        lines += [f"Against the adapter model: KL {parity.kl:.1e} nats a token over {parity.tokens} tokens, "
                  f"{parity.same_verdicts:.0%} of {parity.prompts} verdicts the same.", ""]  # fmt: skip
    if kept is not None:
        failed = "" if kept.survived else "**What was forgotten, or what was kept, did not survive this export.** "
        lines += [f"{failed}As written: {kept.line()}.", ""]
    return lines


def _earlier_requests(earlier: Mapping[str, Survival | None], manifest: Mapping[str, Any]) -> list[str]:
    lines = [f"The earlier request {Path(name).name} was withdrawn: it is not in this model.\n"
             for name in manifest.get("withdrawn") or []]  # fmt: skip
    unasked = "is in it too" if manifest.get("unchecked") else "was not asked about: its adapter lies in no run"
    for name, kept in earlier.items():
        came_back = kept is not None and not has_kept(kept.forgetting_kept)
        told = unasked if kept is None else f"{'**has come back**' if came_back else 'is in it too'}: {kept.line()}"
        lines += [f"The earlier request {name} {told}.", ""]
    return lines


def _audit_table(run: RunDir) -> list[str]:
    file = run.audit / "audit.json"
    if not file.is_file():
        return ["The run was not audited."]
    try:
        summary = json.loads(file.read_text("utf-8"))
    except ValueError:
        return ["The run's audit cannot be read."]
    if summary.get("guard") or summary["candidate"]["path"] != str(run.path):
        return ["The audit beside the run is of another deployment."]
    rows = [
        f"| {each['name']} | {_say(each['base'])} | {_say(each['candidate'])} | {_say(each['low'])} to "
        f"{_say(each['high'])} | {each['n']} |"
        for each in summary["metrics"]
    ]
    questions = [f"- {question}" for question in summary["open_questions"]]
    failed = [gate["name"] for gate in summary["gates"] if gate["passed"] is False]
    verdict = f"Suite {summary['suite']}: {(summary.get('diagnosis') or {}).get('state', 'not diagnosed')}; "
    failed += [f"those of {name}" for name, own in summary.get("earlier", {}).items() if own and not own["passed"]]
    verdict += f"gates failed: {', '.join(failed)}." if failed else "no gate failed."
    return [
        verdict,
        "",
        "| metric | before | after | 95% | rows |",
        "| --- | --- | --- | --- | --- |",
        *rows,
        "",
        *questions,
    ]


def _say(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
