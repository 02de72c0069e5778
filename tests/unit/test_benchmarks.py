"""TOFU and MUSE through an audit: the same figures as from their definitions, and their files as they ship."""

import json

import pytest
from conftest import make_model, make_tokenizer
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import roc_auc_score

from align_unlearn.audit.benchmarks import BENCHMARKS, Limits, muse, tofu
from align_unlearn.audit.run import run_audit
from align_unlearn.audit.subjects import Subject
from align_unlearn.audit.tofu import tofu_figures
from align_unlearn.audit.tofu_probe import evaluate, read_questions
from align_unlearn.errors import UserError


def quiet(line):
    """Nothing is printed in tests."""


@pytest.fixture
def subjects(tokenizer):
    return {
        name: Subject(name, make_model(seed).eval(), tokenizer, name, "float32", name)
        for seed, name in enumerate(["base", "candidate", "control"])
    }


@pytest.fixture
def tofu_sources(tmp_path):
    sources = {}
    for name in tofu.SETS:
        rows = [
            {"question": f"Who is {name} {n}?", "answer": f"The {n}th clerk.",
             "paraphrased_answer": f"Clerk number {n}.", "perturbed_answer": ["A baker.", f"The {n}th miller."]}
            for n in range(6)
        ]  # fmt: skip
        file = tmp_path / f"{name}.jsonl"
        file.write_text("\n".join(json.dumps(row) for row in rows))
        sources[name] = str(file)
    return sources


def test_tofu_gives_its_own_figures(subjects, tofu_sources):
    records = tofu.ask(subjects, tofu_sources, Limits(None, 3))
    found = {each["name"]: each for each in tofu.metrics(records)}
    tables = {
        name: evaluate(subject, {each: read_questions(tofu_sources[each]) for each in tofu.SETS}, max_new_tokens=3)
        for name, subject in subjects.items()
    }
    for name in ("base", "candidate"):
        for figure, value in tofu_figures(tables[name], tables["control"]).items():
            assert found[f"tofu.{figure}"][name] == pytest.approx(value, rel=1e-4, abs=1e-9)
    assert found["tofu.forget.probability"]["low"] <= found["tofu.forget.probability"]["candidate"]
    alone = {name: subjects[name] for name in ("base", "candidate")}
    without = {each["name"] for each in tofu.metrics(tofu.ask(alone, tofu_sources, Limits(3, 3)))}
    assert "tofu.forget_quality" not in without, "there is no retain-only model to compare with"
    assert set(found) == {f"tofu.{name}" for name in tofu.FIGURES}


def test_tofu_names_the_set_that_is_missing(subjects, tofu_sources):
    del tofu_sources["world_facts"]
    with pytest.raises(UserError, match="world_facts"):
        tofu.ask(subjects, tofu_sources, Limits(None, 3))
    with pytest.raises(UserError, match="did you mean retain"):
        tofu.ask(subjects, {"retian": "x"}, Limits(None, 3))


@pytest.fixture
def muse_folder(tmp_path):
    folder = tmp_path / "MUSE"
    contents = {
        "verbmem": [{"prompt": "The clerk of the pans,", "gt": "a long pale man."}] * 2,
        "forget_qa": [{"question": "Who kept the tally?", "answer": "The clerk."}],
        "retain_qa": [{"question": "Who baked?", "answer": "The baker."}],
        "privleak_forget": [f"A text about the clerk, number {n}, and his pans." for n in range(5)],
        "privleak_holdout": [f"Another text, number {n}, about the ferry and the tide." for n in range(4)],
    }
    for name, content in contents.items():
        file = folder / muse.FILES[name]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
    return folder


def test_muse_in_its_own_layout(subjects, muse_folder):
    records = muse.ask(subjects, {"folder": str(muse_folder)}, Limits(None, 6))
    found = {each["name"]: each for each in muse.metrics(records)}
    assert set(found) == set(muse.names({}))
    asked = subjects["candidate"]
    prompt = asked.tokenizer("The clerk of the pans,", return_tensors="pt").input_ids
    said = asked.model.generate(prompt, max_new_tokens=6, do_sample=False)[0, prompt.shape[1] :]
    text = asked.tokenizer.decode(said, skip_special_tokens=True).strip()
    score = RougeScorer(["rougeL"], use_stemmer=True).score("a long pale man.", text)["rougeL"].fmeasure
    assert found["muse.verbmem"]["candidate"] == pytest.approx(score)
    auc = {}
    for who in subjects:
        members, others = (
            [each["min_k_40"] for each in records if (each["set"], each["model"]) == (f"privleak_{name}", who)]
            for name in ("forget", "holdout")
        )
        auc[who] = roc_auc_score([1] * 5 + [0] * 4, members + others)
    expected = 100 * ((1 - auc["candidate"]) - (1 - auc["control"])) / (1 - auc["control"])
    assert found["muse.privleak"]["candidate"] == pytest.approx(expected)
    assert found["muse.privleak"]["control"] == 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"folder": "nowhere"}, "no such folder"),
        ({"verbmen": "x"}, "verbmem"),
        ({"verbmem": "builtin:harmful"}, "prompt and gt"),
        ({"privleak_forget": "builtin:harmful"}, "column text"),
    ],
)
def test_muse_says_what_does_not_fit(subjects, given, said):
    with pytest.raises(UserError, match=said):
        muse.ask(subjects, given, Limits(None, 3))


def test_a_suite_of_benchmarks_alone_needs_no_forget_set(tmp_path, muse_folder, tofu_sources):
    for seed, name in enumerate(["base", "candidate"]):
        make_model(seed).save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    rows = [{"question": "Two and two?", "choices": ["4", "5"], "answer": 0}] * 3
    (tmp_path / "mmlu.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    choices = {"mmlu": str(tmp_path / "mmlu.jsonl")}
    suite = {"tokens": 3, "rows": {"benchmarks": 3}, "benchmarks": {
        "multiple_choice": choices, "open_answers": choices,
        "tofu": tofu_sources, "muse": {"folder": str(muse_folder)}}}  # fmt: skip
    (tmp_path / "mine.yaml").write_text(json.dumps(suite))
    found = run_audit(
        tmp_path / "candidate", suite=str(tmp_path / "mine.yaml"), out=tmp_path / "out", base=str(tmp_path / "base"),
        gates={"utility.mmlu": "point >= 0", "tofu.model_utility": "point >= 0"}, say=quiet,
    )  # fmt: skip
    names = {each["name"] for each in found.summary["metrics"]}
    assert {"utility.mmlu", "utility.mmlu.open", "tofu.model_utility", "muse.verbmem"} <= names
    assert found.passed
    assert set(BENCHMARKS) >= {"lm_eval"}


def test_lm_eval_says_how_to_get_it(subjects, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"align-unlearn\[lm-eval\]"):
        BENCHMARKS["lm_eval"].ask(subjects, {"tasks": ["arc_easy"]}, Limits(2, 3))
    with pytest.raises(UserError, match="tasks"):
        BENCHMARKS["lm_eval"].ask(subjects, {"task": "arc_easy"}, Limits(2, 3))
