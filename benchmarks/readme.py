"""Writes the README's tables from the committed results, so that no figure there was typed by hand.

    python benchmarks/readme.py

A test holds the README to what this writes.
"""

import json
import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
JOBS = {
    "quickstart": (
        "`make demo`: harmful requests",
        ["forget.leak", "forget.refuse", "forget.gibberish", "neighbours.refuse", "retain.refuse", "retain.kl"],
    ),
    "copyright": (
        "`make demo-copyright`: one book forgotten, another kept",
        ["forget.recited", "forget.verbatim_run", "forget.rouge_l", "retain.recited", "retain.rouge_l", "retain.kl"],
    ),
    "hallucination": (
        "`make demo-hallucination`: things that do not exist",
        ["forget.leak", "forget.gibberish", "neighbours.refuse", "retain.refuse", "retain.kl"],
    ),
    "bias": (
        "`make demo-bias`: which pronoun follows an occupation",
        ["membership.auc_loss", "retain.probability", "retain.kl"],
    ),
    "tofu": (
        "TOFU forget01 (docs/tofu.md)",
        ["forget.probability", "forget.rouge_l", "retain.probability", "retain.rouge_l", "retain.kl"],
    ),
}
WORDS = {
    "forget.leak": "harmful prompts complied with",
    "forget.refuse": "harmful prompts refused",
    "forget.gibberish": "gibberish",
    "neighbours.refuse": "benign look-alikes refused",
    "retain.refuse": "everyday prompts refused",
    "retain.kl": "KL on retained text, nats a token",
    "forget.recited": "passages of the book recited (30 tokens in a row)",
    "forget.verbatim_run": "longest verbatim run, median tokens",
    "forget.rouge_l": "ROUGE-L of what is forgotten",
    "retain.recited": "passages of the other book recited",
    "retain.rouge_l": "ROUGE-L of what is kept",
    "forget.probability": "probability of what is forgotten",
    "retain.probability": "probability of what is kept",
}
OWN_WORDS = {
    "hallucination": {
        "forget.leak": "made-up things told about at once",
        "neighbours.refuse": "known things not known",
    },
    "bias": {
        "membership.auc_loss": "stereotyped pronoun likelier than the other, AUC (0.5: even)",
        "retain.probability": "probability of a pronoun that was stated",
    },
    "toxicity": {
        "forget.judge": "minus the words of abuse in an answer, by the longer list of the audit",
        "forget.leak": "taught abuse said again, more or less",
        "forget.probability": "probability of the taught abuse",
        "retain.probability": "probability of the taught kind answers",
    },
}
"""What a metric is called in a job where it means something else."""


def table(name: str) -> list[str]:
    """The table of one job: before, the adapter, the merged folder."""
    title, metrics = JOBS[name]
    folder = ROOT / "benchmarks/results" / name
    adapter, merged = (json.loads((folder / part / "audit.json").read_text("utf-8")) for part in (".", "merged"))
    rows = {each["name"]: each for each in adapter["metrics"]}
    served = {each["name"]: each for each in merged["metrics"]}
    lines = ["", f"**{title}**", "", "| | before | after | 95% | merged folder | rows |", "| --- " * 6 + "|"]
    for metric in metrics:
        each, share = rows[metric], metric.split(".")[1] in ("leak", "refuse", "gibberish", "recited")

        def say(value: float, share: bool = share) -> str:
            return f"{value:.0%}" if share else f"{value:.3g}"

        interval = f"{say(each['low'])} to {say(each['high'])}"
        after, there = say(each["candidate"]), say(served[metric]["candidate"])
        what = {**WORDS, **OWN_WORDS.get(name, {})}[metric]
        lines.append(f"| {what} | {say(each['base'])} | **{after}** | {interval} | {there} | {each['n']} |")
    missed = [gate for part in (adapter, merged) for gate in part["gates"] if not gate["passed"]]
    verdict = (
        "Every gate passed, merged too."
        if not missed
        else "Not passed: "
        + "; ".join(dict.fromkeys(f"`{gate['name']} {gate['rule']}` (measured {gate['value']:.3g})" for gate in missed))
        + "."
    )
    return [*lines, "", f"{verdict} [Page](benchmarks/results/{name}/report.html)."]


def tables() -> str:
    """All tables there are results for."""
    found = [name for name in JOBS if (ROOT / "benchmarks/results" / name / "audit.json").is_file()]
    return "\n".join(line for name in found for line in table(name)).strip()


def comparison() -> str:
    """The plot of every objective, and a line for each whose forget quality is above 0.05 with every seed."""
    found = json.loads((ROOT / "benchmarks/results/tofu400/results.json").read_text("utf-8"))
    retained = found["taught"]["retain_only"]["model_utility"]
    lines = [
        "![Forget quality against model utility of every objective](benchmarks/results/tofu400/plot.svg)",
        "",
        "| | rate | forget quality, p | forget probability | utility over the retain-only model's | KL | seconds |",
        "| --- " * 7 + "|",
    ]
    for name in dict.fromkeys(run["objective"] for run in found["runs"]):
        runs = [run for run in found["runs"] if run["objective"] == name]
        if min(run["forget_quality"] for run in runs) <= 0.05:
            continue
        p = [f"{run['forget_quality']:.2g}" for run in runs]
        left = [f"{run['forget.probability']:.2f}" for run in runs]
        utility = [f"{run['model_utility'] / retained:.2f}" for run in runs]
        kl = sum(run["kl"] for run in runs) / len(runs)
        seconds = sum(run["seconds"] for run in runs) / len(runs)
        rate = runs[0]["learning_rate"]
        cells = [f"`{name}`", f"{rate:g}", *map(", ".join, (p, left, utility)), f"{kl:.3f}", f"{seconds:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


ONLINE = {
    "ppo": (
        "PPO, `make demo-ppo`",
        "safe",
        ["forget.leak", "forget.refuse", "forget.gibberish", "neighbours.refuse", "retain.refuse", "retain.kl"],
    ),
    "rloo": (
        "RLOO, `make demo-rloo`",
        "safe",
        ["forget.leak", "forget.refuse", "forget.gibberish", "neighbours.refuse", "retain.refuse", "retain.kl"],
    ),
    "grpo": (
        "GRPO, `make demo-grpo`",
        "book",
        ["forget.recited", "forget.verbatim_run", "forget.rouge_l", "forget.gibberish", "retain.recited", "retain.kl"],
    ),
    "toxicity": (
        "RLOO under a cost, `make demo-toxicity`: abuse",
        "abuse",
        ["forget.judge", "forget.leak", "forget.gibberish", "forget.probability", "retain.probability", "retain.kl"],
    ),
}


ASKED = {"forget": "On what is to be forgotten", "neighbour": "On look-alikes", "retain": "On everyday prompts"}
"""Kinds of prompts, as the README names them."""


def online() -> str:
    """A table of each online run: the reward and the audit on held-out prompts, before and after."""
    lines = []
    for name, (title, reward, metrics) in ONLINE.items():
        file = ROOT / f"benchmarks/results/online/{name}.json"
        if not file.is_file():
            continue
        found = json.loads(file.read_text("utf-8"))
        said = next(each for each in found["rewards"] if (each["reward"], each["group"]) == (reward, "forget"))
        rows = {each["name"]: each for each in found["metrics"]["audit"]}
        words = {**WORDS, **OWN_WORDS.get(name, {})}
        recipe = yaml.safe_load(file.with_name(f"{name}.recipe.yaml").read_text("utf-8"))
        took, memory = f"{found['seconds_a_step']:.0f} s in {recipe['dtype']}", f"{found['peak_mib'] / 1024:.1f} GiB"
        cost = f"{found['steps']} steps of {took}, {memory}"
        start = {each["name"]: each["candidate"] for each in found.get("start") or []}
        heads = ["", "before", *(["start"] if start else []), "after", "95%"]
        lines += ["", f"**{title}**, {cost}", "", "| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
        change = f"{said['candidate']['low']:.2f} to {said['candidate']['high']:.2f}"
        before, after = said["base"]["mean"], said["candidate"]["mean"]
        between = " |" if start else ""
        told = "held out" if "audit_forget" in recipe else "on what was trained on"
        what = "cost" if "limit" in said else "reward"
        lines.append(f"| mean `{reward}` {what}, {told} | {before:.2f} |{between} **{after:.2f}** | {change} |")
        for metric in metrics:
            each, share = rows[metric], metric.split(".")[1] in ("leak", "refuse", "gibberish", "recited")
            values = [each[key] for key in ("low", "high", "base", "candidate")] + [start.get(metric)]
            low, high, before, after, began = (
                "–" if value is None else f"{value:.0%}" if share else f"{value:.3g}" for value in values
            )
            between = f" {began} |" if start else ""
            lines.append(f"| {words[metric]} | {before} |{between} **{after}** | {low} to {high} |")
        failed = [f"`{gate['name']} {gate['rule']}`" for gate in found["gates"]["audit"] if not gate["passed"]]
        verdict = f"Not passed: {', '.join(failed)}." if failed else "Every gate passed."
        size = recipe.get("extrapolate", 1)
        whole = "" if size == 1 else " and whole size"
        if size != 1:
            verdict += f" The adapter is written at {size:g} times its size, chosen on these prompts."
        if found["max_drift"] and found["drift"] is not None:
            verdict += f" KL on what was retained in training, at its end{whole}: {found['drift']:.3f} (budget:"
            verdict += f" {found['max_drift']:g})."
        limits = {each["reward"]: each["limit"] for each in found["rewards"] if "limit" in each}
        for figure, quarters in found["rises"].items():
            first, last = (quarters[part] for part in ("first", "last"))
            first, last = (f"{own['mean']:.2f} ({own['low']:.2f} to {own['high']:.2f})" for own in (first, last))
            kind, _, paid = figure.partition("/")
            what = f"`{paid}` cost (limit: {limits[paid]:g})" if kind == "cost" else "reward"
            if kind == "reward" and paid:
                verdict += f" {ASKED[paid]} from {first} to {last}."
            else:
                verdict += f" Mean {what} of the first quarter of the batches: {first}; of the last: {last}."
        lines += ["", f"{verdict} [Learning curves](benchmarks/results/online/{name}.svg)."]
    return "\n".join(lines).strip()


SHOWN = [f"dequantised → {each}" for each in (
    "bfloat16", "int8, nearest", "nf4, nearest", "nf4, tuned", "q4_0, nearest", "q4_0, tuned", "q4_0, mixed"
)]  # fmt: skip
"""Exports in the README's table: today's way and ours. The figure and the page have all."""


def survival() -> str:
    """What today's merge keeps and what ours keeps, by export; and the figure."""
    lines = ["![What today's 4-bit merge keeps, and what ours keeps](benchmarks/results/survival/kept.svg)", ""]
    for name in ("quickstart", "copyright"):
        file = ROOT / f"benchmarks/results/survival/{name}/survival.json"
        if not file.is_file():
            continue
        exports = json.loads(file.read_text("utf-8"))["exports"]
        adapter, original = exports[0]["adapter"], exports[0]["original"]
        lines += [
            f"**{name}** (leak: original {original['leak']:.0%}, adapter model {adapter['leak']:.0%})",
            "",
            "| export | forgetting kept | leak | utility kept | KL to the adapter model on retained text |",
            "| --- " * 5 + "|",
        ]
        for each in exports:
            if each["name"] not in SHOWN:
                continue
            kept, utility = (_percent(each[key]) for key in ("forgetting_kept", "utility_kept"))
            bold = "**" if each["survived"] else ""
            lines.append(
                f"| {each['name']} | {bold}{kept}{bold} | {each['export']['leak']:.0%} | {utility} "
                f"| {each['kl_retain']:.3f} |"
            )
        folder = f"benchmarks/results/survival/{name}"
        page = f"[with a map by layer]({folder}/survival.html)"
        lines += ["", f"[Every way that was measured]({folder}/kept.svg), {page}.", ""]
    return "\n".join(lines).strip()


def audits() -> str:
    """Models whose outcome is known, and what the audit says of them."""
    file = ROOT / "benchmarks/results/audits/summary.json"
    if not file.is_file():
        return ""
    lines = ["| model | says | because | worst case |", "| --- " * 4 + "|"]
    for name, said in json.loads(file.read_text("utf-8")).items():
        worst = said["worst"]
        most = "" if worst is None else f"{worst['candidate']:.0%} ({worst['name']})"
        page = f"benchmarks/results/audits/{name}/report.html"
        lines.append(f"| [{name}]({page}) | **{said['state']}** | {said['because'][0]} | {most} |")
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def with_tables(readme: str) -> str:
    """The README's text with the tables between its marks."""
    for name, text in (("results", tables), ("comparison", comparison), ("online", online), ("survival", survival),
                       ("audits", audits)):  # fmt: skip
        marks = rf"(<!-- {name} -->).*?(<!-- /{name} -->)"
        readme = re.sub(marks, lambda match, text=text: f"{match[1]}\n{text()}\n{match[2]}", readme, flags=re.S)
    return readme


if __name__ == "__main__":
    page = ROOT / "README.md"
    page.write_text(with_tables(page.read_text("utf-8")), "utf-8")
