"""Every objective on one small TOFU world, with the same adapters, data and steps: which one to choose.

    python benchmarks/compare_tofu.py [--tofu FOLDER]        (`make compare-tofu`)

The world has 400 rows, 20 authors: 2 are forgotten, 18 stay. Prompts are plain ("Question: … Answer:", the form that
the benchmark gives base models). Two models are taught, one all rows, one those of the 18. Each objective runs at every
learning rate of compare_tofu.yaml; one is picked by a rule that knows nothing of the second model:

    among the runs that keep at least 95% of the probability of the answers to be kept, the one whose truth ratios on
    the forgotten authors are most like those that the taught model has on authors it was never taught (the p value
    of a two-sample Kolmogorov–Smirnov test); where none keeps that much, the one that keeps most.

Picked runs are then evaluated whole, the best three with every seed. Each run is a process of its own, so that its peak
memory is its own; each leaves a record under runs/tofu400, and what has a record is not run again.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tofu400 import (
    PLAN,
    ROOT,
    RUNS,
    Setting,
    picked,
    read_record,
    record_of,
    run_folder,
    whole_record_of,
    write_results,
)

from align_unlearn.data.sources import read_rows
from align_unlearn.errors import UserError
from align_unlearn.files import write_json, write_json_lines

WORLD = RUNS / "world"
HUB = "locuslab/TOFU"
SETS = {
    "forget": "forget01_perturbed",
    "retain": "retain_perturbed@[:360]",
    "real_authors": "real_authors_perturbed",
    "world_facts": "world_facts_perturbed",
    "never_taught": "forget05_perturbed@[:160]",
}
EVALUATED = {
    "forget": "forget.jsonl",
    "retain": "retain.jsonl@[::12]",
    "real_authors": "real_authors.jsonl@[::4]",
    "world_facts": "world_facts.jsonl@[::4]",
}


def make_world(tofu: str) -> None:
    """Writes the sets as plain prompts, from the hub or a folder of the benchmark's files."""
    for name, place in SETS.items():
        file = WORLD / f"{name}.jsonl"
        if file.is_file():
            continue
        config, _, kept = place.partition("@")
        source = f"{tofu}@{config}{kept}" if Path(tofu).is_dir() else f"{tofu}:{config}@train{kept}"
        rows = [row.columns for row in read_rows(source)]
        write_json_lines(file, [plain(row) for row in rows])


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """A row as text that is continued; answers begin with a space."""
    wrong = row["perturbed_answer"]
    return {
        "prompt": f"Question: {row['question']}\nAnswer:",
        "completion": f" {row['answer']}",
        "paraphrased_answer": f" {row.get('paraphrased_answer') or row['answer']}",
        "perturbed_answer": [f" {each}" for each in ([wrong] if isinstance(wrong, str) else wrong)],
    }


LESSONS = {"full": ["forget", "retain"], "retain_only": ["retain"]}
KNOWN = ["retain.jsonl@[::3]", "real_authors.jsonl", "world_facts.jsonl"]
"""A second lesson for both: a model of this size knows next to nothing of the benchmark's real authors and world facts,
and a harmonic mean of nothing shows nothing. They are not among the rows that unlearning holds on to."""


def teach(name: str) -> None:
    """Teaches a model in two lessons; `finetune` finds out by itself what has been done."""
    from align_unlearn.training.finetune import finetune, load_lesson

    first = [f"{each}.jsonl" for each in LESSONS[name]]
    second = [*(["forget.jsonl"] if "forget" in LESSONS[name] else []), *KNOWN]
    further = [
        "--model_name_or_path",
        str(RUNS / f"{name}_first"),
        "--learning_rate",
        "5e-4",
        "--num_train_epochs",
        "3",
    ]
    for sets, folder, words in ((first, f"{name}_first", []), (second, name, further)):
        sources = [str(WORLD / each) for each in sets]
        lesson = ["--datasets", *sources, "--output_dir", str(RUNS / folder), *words]
        finetune(*load_lesson(ROOT / "recipes/tofu_teach.yaml", lesson))


def write_alternatives() -> None:
    """Alternative answers of SmolLM2 itself, which still reads a chat, for `altpo`; as plain prompts."""
    from align_unlearn.config import BaseModelConfig
    from align_unlearn.training.alternatives import write_alternatives

    chats = [
        {"question": row["prompt"].removeprefix("Question: ").removesuffix("\nAnswer:"), "answer": row["completion"]}
        for row in (each.columns for each in read_rows(str(WORLD / "forget.jsonl")))
    ]
    write_json_lines(WORLD / "chats.jsonl", chats)
    config = BaseModelConfig(load_in_4bit=False, dtype="bfloat16")
    told = write_alternatives(str(WORLD / "chats.jsonl"), WORLD / "told.jsonl", config)
    rows = [
        {
            "prompt": f"Question: {each.columns['prompt'][-1]['content']}\nAnswer:",
            "chosen": f" {each.columns['chosen'].strip()}",
            "rejected": each.columns["rejected"],
        }
        for each in read_rows(str(told))
    ]
    write_json_lines(WORLD / "alternatives.jsonl", rows)


def examine_taught(name: str) -> None:
    """The whole table of rows of a taught model, and of authors that it was never taught."""
    from align_unlearn.audit.tofu_probe import evaluate, losses

    subject = plain_model(RUNS / name)
    began = time.monotonic()
    evaluation = evaluate(subject, sets_of(EVALUATED), max_new_tokens=PLAN["answer_tokens"])
    never = losses(subject, sets_of({"never_taught": "never_taught.jsonl@[::2]"})["never_taught"])
    record = {"name": name, "sets": as_json({**evaluation, "never_taught": never}), "drift": 0.0}
    write_json(RUNS / f"{name}.json", record | {"seconds_of_evaluation": time.monotonic() - began})


def run_one(setting: Setting) -> None:
    """Trains one run and measures what the rule needs."""
    from align_unlearn.audit.likelihood import likelihood
    from align_unlearn.audit.subjects import open_subjects
    from align_unlearn.audit.tofu_probe import losses
    from align_unlearn.data.tokens import tokenise
    from align_unlearn.training.job import train
    from align_unlearn.training.recipe import load_recipe

    record: dict[str, Any] = dict(zip(("objective", "learning_rate", "seed"), setting, strict=True))
    began = time.monotonic()
    try:
        run = train(load_recipe(ROOT / PLAN["recipe"], overrides(setting)))
    except UserError as error:  # a loss that is not a number ends a run, not the comparison
        write_json(record_of(setting), record | {"failed": str(error).splitlines()[0]})
        return
    record |= {
        "seconds": time.monotonic() - began,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "steps": run.manifest()["steps"],
    }
    subjects = open_subjects(run.path)
    questions = sets_of(EVALUATED)
    given = [(each.example, tokenise(subjects["base"].tokenizer, each.example, max_length=None))
             for each in questions["retain"]]  # fmt: skip
    kept = likelihood(subjects, "retain", given)
    record |= {
        "forget": as_json({"forget": losses(subjects["candidate"], questions["forget"])})["forget"],
        "retain_probability": {
            name: [each["probability"] for each in kept if each["model"] == name] for name in subjects
        },
        "drift": [each["kl"] for each in kept if each["model"] == "candidate"],
    }
    write_json(record_of(setting), record)


def examine_run(setting: Setting) -> None:
    """The whole table of rows of one run; the losses on its forget rows are there already."""
    from align_unlearn.audit.subjects import open_subjects
    from align_unlearn.audit.tofu_probe import evaluate, recalls

    subject, questions = open_subjects(run_folder(setting))["candidate"], sets_of(EVALUATED)
    asked = questions.pop("forget")
    rouge = recalls(subject, asked, max_new_tokens=PLAN["answer_tokens"])
    rows = read_record(record_of(setting))["forget"]
    forget = [{**row, "rouge_recall": recall} for row, recall in zip(rows, rouge, strict=True)]
    evaluation = evaluate(subject, questions, max_new_tokens=PLAN["answer_tokens"])
    write_json(whole_record_of(setting), {"sets": {"forget": forget, **as_json(evaluation)}})


def overrides(setting: Setting) -> list[str]:
    """What a run of the comparison sets beside the recipe, as command-line words."""
    objective, learning_rate, seed = setting
    words = {
        "model_name_or_path": RUNS / "full",
        "forget_dataset": WORLD / "forget.jsonl",
        "retain_dataset": WORLD / "retain.jsonl",
        "objective": objective,
        "learning_rate": learning_rate,
        "seed": seed,
        "output_dir": run_folder(setting),
        "max_steps": PLAN["steps"],
        "save_strategy": "no",
        "disable_tqdm": "true",
        **PLAN["objectives"][objective],
    }
    filled = {"WORLD": str(WORLD), "EPSILON": str(taught_retain_loss())}
    found = []
    for name, value in words.items():
        text = str(value)
        for key, meant in filled.items():
            text = text.replace(key, meant)
        found += [f"--{name}", text]
    return found


def taught_retain_loss() -> float:
    """ε of `pdu`: the NLL a token that the taught model has on the rows to keep, and a twentieth of a nat."""
    rows = read_record(RUNS / "full.json")["sets"]["retain"]
    return float(round(sum(row["answer_loss"] for row in rows) / len(rows) + 0.05, 3))


def sets_of(places: dict[str, str]) -> dict[str, Any]:
    """Questions by set."""
    from align_unlearn.audit.tofu_probe import read_questions

    return {name: read_questions(str(WORLD / place)) for name, place in places.items()}


def plain_model(path: Path) -> Any:
    """A taught model in the precision that the runs hold it in."""
    from align_unlearn.audit.subjects import Subject
    from align_unlearn.config import BaseModelConfig
    from align_unlearn.modeling.load import load_base
    from align_unlearn.modeling.tokenizer import load_tokenizer

    config = BaseModelConfig(model_name_or_path=str(path), load_in_4bit=False, dtype="bfloat16")
    return Subject(path.name, load_base(config).eval(), load_tokenizer(str(path)), str(path), "bfloat16", path.name)


def as_json(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Rows as mappings; what was not measured (nan) is left out."""

    def measured(row: Any) -> dict[str, Any]:
        return {name: value for name, value in asdict(row).items() if value == value}

    return {name: [measured(row) for row in rows] for name, rows in evaluation.items()}


class Work:
    """Pieces of work in processes of their own, each told and timed, none done twice."""

    def __init__(self) -> None:
        self.processes = multiprocessing.get_context("forkserver")
        self.processes.set_forkserver_preload(
            ["align_unlearn.training.job", "align_unlearn.audit.tofu_probe", "align_unlearn.training.finetune"]
        )
        self.began = time.monotonic()

    def do(self, title: str, done: Path, function: Callable[..., None], *arguments: Any) -> None:
        """Runs `function` unless `done` is there already.

        Raises:
            SystemExit: it failed; what was done before stays done.
        """
        if done.exists():
            return
        print(f"[{time.monotonic() - self.began:5.0f} s] {title}", flush=True)
        process = self.processes.Process(target=function, args=arguments)
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"{title} failed; the next run takes up here")


def compare(tofu: str) -> None:
    """The whole comparison, from where it was cut."""
    make_world(tofu)
    work = Work()
    for name in LESSONS:
        work.do(f"teaching {name}", RUNS / name / "manifest.json", teach, name)
        work.do(f"examining {name}", RUNS / f"{name}.json", examine_taught, name)
    work.do("alternative answers", WORLD / "alternatives.jsonl", write_alternatives)
    first = PLAN["seeds"][0]
    for learning_rate in PLAN["learning_rates"]:
        for objective in PLAN["objectives"]:
            setting = (objective, learning_rate, first)
            work.do(f"{objective} at {learning_rate:g}", record_of(setting), run_one, setting)
    best = picked()
    for objective, learning_rate, _ in best[: PLAN["best"]]:
        for seed in PLAN["seeds"]:
            setting = (objective, learning_rate, seed)
            work.do(f"{objective} with seed {seed}", record_of(setting), run_one, setting)
            work.do(f"examining {objective} with seed {seed}", whole_record_of(setting), examine_run, setting)
    for setting in best[PLAN["best"] :]:
        work.do(f"examining {setting[0]}", whole_record_of(setting), examine_run, setting)
    print(write_results())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tofu", default=HUB, help="TOFU: a hub id, or a folder of the benchmark's JSON files")
    compare(parser.parse_args().tofu)
