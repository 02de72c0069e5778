"""The model card of an export: what was forgotten, what it cost, and what is not known."""

from __future__ import annotations

import json
from typing import Any

from align_unlearn.export.verify import Parity
from align_unlearn.run_dir import RunDir


def model_card(run: RunDir, manifest: dict[str, Any], parity: Parity) -> str:
    """A card in the hub's format, from the run's manifest and its audit, if there is one."""
    base = manifest["base"]
    lines = [
        "---",
        f"base_model: {base['name']}",
        "library_name: transformers",
        "tags: [unlearning, align-unlearn]",
        "---",
        "",
        "# Unlearned model",
        "",
        f"`{base['name']}` after unlearning with LoRA on a base held as {base['precision']}, merged in fp32 and "
        f"written as {manifest['dtype']}.",
        "",
        f"Against the adapter model: KL {parity.kl:.1e} nats a token over {parity.tokens} tokens, "
        f"{parity.same_verdicts:.0%} of {parity.prompts} verdicts the same.",
        "",
        "## Audit of the adapter model",
        "",
        *_audit_table(run),
        "",
        "## Limits",
        "",
        "What is reported is what was not recovered by the probes named, at their budget; it is not a proof of "
        "removal. Quantising this folder to 4 bits can bring the forgotten back: audit what you serve.",
        "",
        "## Reproduce",
        "",
        "`align-unlearn train recipe.yaml` with the `recipe.yaml` of this folder; versions are in `manifest.json`.",
        "",
    ]
    return "\n".join(lines)


def _audit_table(run: RunDir) -> list[str]:
    file = run.audit / "audit.json"
    if not file.is_file():
        return ["The run was not audited."]
    summary = json.loads(file.read_text("utf-8"))
    rows = [
        f"| {each['name']} | {each['base']:.3g} | {each['candidate']:.3g} | {each['low']:.3g} to {each['high']:.3g} "
        f"| {each['n']} |"
        for each in summary["metrics"]
    ]
    questions = [f"- {question}" for question in summary["open_questions"]]
    return ["| metric | before | after | 95% | rows |", "| --- | --- | --- | --- | --- |", *rows, "", *questions]
