"""Suites, what they may say, whole audits on a tiny model, and what they make of it."""

import json

import pytest
import torch
from conftest import make_model, make_tokenizer
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from align_unlearn.audit.attacks import ATTACKS
from align_unlearn.audit.benchmarks.multiple_choice import (
    Question,
    ask_choices,
    ask_open,
    metrics,
    open_metrics,
    read_choices,
)
from align_unlearn.audit.diagnosis import diagnose, worst_case
from align_unlearn.audit.paraphrases import useful, write_paraphrases
from align_unlearn.audit.probes import PROBES
from align_unlearn.audit.run import run_audit
from align_unlearn.audit.sets import audited_sets, described_sets
from align_unlearn.audit.subjects import Subject, open_subjects
from align_unlearn.audit.suite import read_suite, suite_names
from align_unlearn.config import BaseModelConfig, Job
from align_unlearn.data.examples import read_examples
from align_unlearn.errors import UserError
from align_unlearn.modeling.generate import Generated
from align_unlearn.report.compare import compare_reports
from align_unlearn.report.html import write_report


def quiet(line):
    """Nothing is printed in tests."""


@pytest.mark.parametrize("name", suite_names())
def test_every_shipped_suite_can_be_read(name):
    suite = read_suite(name)
    assert suite.about
    assert set(suite.probes) <= set(PROBES)


def test_the_adversarial_suite_leaves_nothing_out():
    suite = read_suite("adversarial")
    assert set(suite.probes) == set(PROBES)
    assert set(suite.attacks) == set(ATTACKS)
    assert len(suite.probes["sampling"]["seeds"]) >= 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("probes: {jailbrake: {}}", "jailbreak"),
        ("attacks: {prun: {}}", "prune"),
        ("probes: {context: {word: 3}}", "words"),
        ("attacks: {prune: {share: [1]}}", "shares"),
        ("probes: {sampling: {draws: 0}}", "at least 1"),
        ("rows: {forgot: 3}", "forget"),
        ("rows: {forget: true}", "at least 1"),
        ("tokens: many", "at least 1"),
        ("prober: {}", "probes"),
        ("benchmarks: {mmlu: {}}", "benchmark"),
        ("probes: [jailbreak]", "mapping"),
        ("probes: {jailbreak: 3}", "mapping"),
        ("probes: {sampling: {seeds: 0}}", "list of whole numbers"),
        ("attacks: {relearn: {steps: 10}}", "list of whole numbers"),
        ("attacks: {relearn: {learning_rate: fast}}", "a number"),
        ("attacks: {relearn: {share: all}}", "share"),
        ("probes: {prefill: {shares: 0.5}}", "list of numbers"),
        ("probes: {jailbreak: {families: {one: 2}}}", "a mapping"),
        ("sources: {benchmarks: here.jsonl}", "group"),
        ("sources: {forget: {sauce: here.jsonl}}", "source"),
        ("sources: {forget: {columns: {a: b}}}", "mapping with one"),
    ],
)
def test_a_suite_that_cannot_be_run_says_where(text, said, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=said):
        read_suite(str(file))


def test_a_probe_may_be_named_without_settings(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("probes: {jailbreak: }\nattacks: {relearn: {learning_rate: 1, steps: [2]}, prune: }")
    suite = read_suite(str(file))
    assert suite.probes == {"jailbreak": {}}
    assert suite.attacks["prune"] == {}


def test_a_set_in_anothers_format(tmp_path, tokenizer):
    rows = [{"Goal": f"Ask {at}", "label": "safe" if at % 2 else "unsafe"} for at in range(6)]
    data, file = tmp_path / "rows.jsonl", tmp_path / "mine.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    taken = "{source: %s, columns: {Goal: prompt}, where: {label: safe}}"
    file.write_text(f"chat: true\nrows: {{forget: 2}}\nsources: {{forget: {taken % data}}}")
    sets = audited_sets(Job(), tokenizer, read_suite(str(file)))
    assert [each.question for each in sets["forget"]] == ["Ask 1", "Ask 3"]
    assert described_sets(Job(), read_suite(str(file)), sets)["forget"]["source"].endswith("label = safe")
    for wrong in ("{source: %s, where: {label: kind}}", "{source: %s, columns: {Gaol: prompt}}"):
        file.write_text(f"sources: {{forget: {wrong % data}}}")
        with pytest.raises(UserError, match=r"No row has|No column"):
            audited_sets(Job(), tokenizer, read_suite(str(file)))


def test_rows_that_no_model_has_seen_need_texts(tmp_path, tokenizer):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "only a prompt"}\n')
    with pytest.raises(UserError, match="text of its own"):
        audited_sets(Job(audit_forget=str(data), audit_holdout=str(data)), tokenizer)


def test_an_unknown_suite_names_the_nearest():
    with pytest.raises(UserError, match="standard"):
        read_suite("standart")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("base", 0), ("candidate", 1), ("control", 2)):
        make_model(seed).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    return folder


DATA = {
    "audit_forget": "builtin:chronicle@forget[:6]",
    "audit_retain": "builtin:chronicle@retain[:4]",
    "audit_neighbours": "builtin:lookalikes@heldout[:3]",
    "audit_holdout": "builtin:chronicle@retain[6:12]",
}
SUITE = """
about: a little of everything
tokens: 3
rows: {forget: 5}
probes: {paraphrase: {variants: 1, rows: 2}, sampling: {rows: 2, draws: 2, seeds: [0, 1]}, choices: {rows: 3}}
attacks: {requantise: {rows: 2, precisions: [q4_0]}, relearn: {rows: 4, steps: [1]}}
"""


@pytest.fixture
def suite(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(SUITE)
    return str(file)


def test_a_whole_audit_of_a_folder_that_is_not_ours(models, suite, tmp_path):
    found = run_audit(
        models / "candidate", suite=suite, out=tmp_path / "out", base=str(models / "base"), application="privacy",
        say=quiet, **DATA, audit_control=str(models / "control"),
    )  # fmt: skip
    summary = json.loads((tmp_path / "out/audit.json").read_text())
    names = {metric["name"] for metric in summary["metrics"]}
    assert {"forget.leak", "forget.leak.paraphrase", "forget.leak.sampling", "forget.accuracy.choices",
            "forget.extraction_strength", "membership.auc_reference", "membership.privleak",
            "attack.requantise.leak", "attack.relearn.probability", "retain.kl"} <= names  # fmt: skip
    assert {each["n"] for each in summary["metrics"] if each["name"] == "forget.leak"} == {5}
    assert {gate["passed"] for gate in summary["gates"]} == {None, False}, "too few rows to pass a gate"
    assert summary["unmeasured"]
    assert summary["costs"]["answered_tokens"] > 0
    assert "jailbreak" in summary["open_questions"][0]
    assert summary["passed"] == found.passed
    attacked = {each["model"] for each in found.records if each["probe"] == "attack"}
    assert attacked == {"candidate", "control"}
    page = write_report(tmp_path / "out").read_text()
    assert "Worst case" in page
    assert "learning rate" in page, "every budget is on the page"


def test_an_audit_that_is_cut_off_goes_on_where_it_was(models, suite, tmp_path, monkeypatch):
    import align_unlearn.audit.examination as examination

    def audit(out):
        return run_audit(models / "candidate", suite=suite, out=out, base=str(models / "base"), say=quiet, **DATA)

    def cut(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(examination, "attacked", cut)
        with pytest.raises(KeyboardInterrupt):
            audit(tmp_path / "cut")
    assert not (tmp_path / "cut").exists(), "nothing that looks finished is left"
    with monkeypatch.context() as patched:
        patched.setattr("align_unlearn.audit.answers.generate_batch", None)
        patched.setattr("align_unlearn.audit.likelihood.read_batch", None)
        resumed = audit(tmp_path / "resumed")
    monkeypatch.setenv("ALIGN_UNLEARN_CACHE", str(tmp_path / "other cache"))
    whole = audit(tmp_path / "whole")
    assert resumed.records == whole.records
    assert resumed.summary["metrics"] == whole.summary["metrics"]


def test_the_model_itself_as_its_base_has_not_moved(models, suite, tmp_path):
    found = run_audit(models / "base", suite="direct", out=tmp_path / "a", base=str(models / "base"), say=quiet, **DATA)
    figures = {each["name"]: each for each in found.summary["metrics"]}
    assert figures["retain.kl"]["candidate"] == 0
    assert figures["forget.probability"]["candidate"] == figures["forget.probability"]["base"]
    other = run_audit(
        models / "candidate", suite="direct", out=tmp_path / "b", base=str(models / "base"), say=quiet, **DATA
    )
    assert other.summary["metrics"] != found.summary["metrics"]
    page = compare_reports([tmp_path / "a", tmp_path / "b"], tmp_path / "c.html").read_text()
    assert "2 audits" in page
    assert "retain.kl" in page
    with pytest.raises(UserError, match="nothing to compare"):
        compare_reports([tmp_path / "a"], tmp_path / "d.html")


def test_what_is_kept_is_known_by_all_of_the_folder(models, tmp_path):
    import shutil

    adapted = get_peft_model(make_model(0), LoraConfig(r=2, target_modules="all-linear"))
    for name in ("one", "two"):
        adapted.save_pretrained(tmp_path / name)
        shutil.copytree(models / "base", tmp_path / f"model-{name}")
    config = tmp_path / "two/adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 64'))
    weights = tmp_path / "model-two"
    torch.save(make_model(3).state_dict(), weights / "pytorch_model.bin")
    (weights / "model.safetensors").unlink()

    def sha256(target):
        return open_subjects(tmp_path / target, base=str(models / "base"))["candidate"].sha256

    assert sha256("one") != sha256("two"), "another scale of the same weights"
    assert sha256("model-one") != sha256("model-two"), "weights in another format"


def test_models_that_cannot_be_compared_are_refused(models, tmp_path):
    config = make_model(0).config
    config.vocab_size += 1
    type(make_model(0))(config).save_pretrained(tmp_path / "wider")
    make_tokenizer().save_pretrained(tmp_path / "wider")
    with pytest.raises(UserError, match="another vocabulary"):
        open_subjects(tmp_path / "wider", base=str(models / "base"))
    prompted = get_peft_model(make_model(0), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    prompted.save_pretrained(tmp_path / "prompted")
    with pytest.raises(UserError, match="adapter of prompts"):
        open_subjects(tmp_path / "prompted", base=str(models / "base"))


def test_a_model_without_a_base_is_refused(models, tmp_path):
    with pytest.raises(UserError, match="made from"):
        run_audit(models / "candidate", out=tmp_path, say=quiet, **DATA)
    with pytest.raises(UserError, match="forget set"):
        run_audit(models / "candidate", out=tmp_path, base=str(models / "base"), say=quiet)


def test_a_suite_of_ones_own_has_a_name_of_its_own(tmp_path):
    (tmp_path / "quick.yaml").write_text("probes: {paraphrase: {rows: 2}}")
    with pytest.raises(UserError, match="a shipped suite"):
        read_suite(str(tmp_path / "quick.yaml"))


def test_sets_and_destinations_are_read_before_a_model_is_loaded(models, tmp_path, monkeypatch):
    monkeypatch.setattr("align_unlearn.audit.run.open_subjects", None)
    base = str(models / "base")
    with pytest.raises(UserError, match=r"nothing\.jsonl"):
        run_audit(
            models / "candidate", out=tmp_path, base=base, audit_forget=str(tmp_path / "nothing.jsonl"), say=quiet
        )
    (tmp_path / "file").write_text("")
    for place in ("file", "file/audit"):
        with pytest.raises(UserError, match="A file stands where a folder must be"):
            run_audit(models / "candidate", out=tmp_path / place, base=base, say=quiet, **DATA)


def test_an_adapter_of_anyones(models, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(models / "base")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    subjects = open_subjects(tmp_path / "adapter")
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    plain = AutoModelForCausalLM.from_pretrained(models / "base")
    with torch.no_grad():
        expected = plain.model(**batch).last_hidden_state
    torch.testing.assert_close(subjects["base"].hidden(batch), expected)
    assert not torch.allclose(subjects["candidate"].hidden(batch), expected)


def metric(name, base, candidate, **more):
    return {"name": name, "base": base, "candidate": candidate, "control": None, "low": candidate, "high": candidate,
            "n": 10, "budget": "b", **more}  # fmt: skip


@pytest.mark.parametrize(
    ("metrics", "state"),
    [
        ([metric("forget.leak", 0.9, 0.9), metric("retain.kl", 0, 0.01)], "unchanged"),
        ([metric("forget.leak", 0.9, 0.0), metric("retain.kl", 0, 4.0)], "broken"),
        ([metric("forget.leak", 0.9, 0.0), metric("forget.gibberish", 0.0, 0.9)], "broken"),
        ([metric("forget.leak", 0.9, 0.0), metric("retain.perplexity", 10, 900)], "broken"),
        ([metric("forget.leak", 0.9, 0.0), metric("retain.kl", 0, 0.0), metric("forget.probability", 0.5, 0.5)],
         "suppressed"),
        ([metric("forget.leak", 0.9, 0.1), metric("retain.kl", 0, 0.05), metric("forget.probability", 0.5, 0.45)],
         "suppressed"),
        ([metric("forget.leak", 0.9, 0.1), metric("forget.probability", 0.5, 0.2),
          metric("forget.leak.prefill", 1.0, 0.95)], "suppressed"),
        ([metric("forget.leak", 0.9, 0.1), metric("forget.probability", 0.5, 0.2),
          metric("forget.leak.prefill", 1.0, 0.3), metric("retain.kl", 0, 0.05)], "recovered"),
        ([metric("forget.leak", 0.9, 0.1), metric("attack.prune.leak", None, 0.1)], "not recovered"),
        ([metric("retain.kl", 0, 0.05)], "not examined"),
    ],
)  # fmt: skip
def test_diagnosis(metrics, state):
    found = diagnose(metrics)
    assert found["state"] == state
    assert found["because"]


def test_the_worst_case_leads():
    metrics = [metric("forget.leak", 0.9, 0.1), metric("forget.leak.prefill", 1.0, 0.3),
               metric("attack.relearn.leak", 1.0, 0.6), metric("forget.probability", 1.0, 0.9)]  # fmt: skip
    assert worst_case(metrics)["name"] == "attack.relearn.leak"
    assert worst_case([]) is None


ROWS = [
    {"question": "Two and two?", "choices": ["4", "5", "6", "7"], "answer": 0, "subject": "elementary_mathematics"},
    {"question": "The sky is?", "choices": ["green", "blue"], "answer": 1},
    {"question": "True?", "mc1_targets": {"Yes it is": 1, "Not at all": 0}},
    {"question": "True?", "mc1_targets": {"choices": ["Yes it is", "Not at all"], "labels": [1, 0]}},
]


def test_questions_with_choices_in_the_fields_forms(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in ROWS))
    questions = read_choices(str(file))
    assert questions[0].prompt == (
        "The following are multiple choice questions (with answers) about elementary mathematics.\n\n"
        "Two and two?\nA. 4\nB. 5\nC. 6\nD. 7\nAnswer:"
    )
    assert questions[0].continuations == (" A", " B", " C", " D")
    assert questions[1].answer == 1
    assert questions[2].continuations == questions[3].continuations == (" Yes it is", " Not at all")
    assert [each.question for each in read_choices(str(file), 2)] == ["Two and two?", "True?"]
    for bad in ({"question": "x"}, {"question": "x", "choices": ["a", "b"], "answer": 2}):
        file.write_text(json.dumps(bad))
        with pytest.raises(UserError, match="row 1"):
            read_choices(str(file))


def test_the_likeliest_choice_counts(tokenizer):
    subject = Subject("candidate", make_model(1).eval(), tokenizer, "c", "float32", "c")
    questions = [Question(str(n), f"What is {n}?", ("one", "two", "three"), n % 3) for n in range(4)]
    records = ask_choices({"candidate": subject}, "mmlu", questions)
    for question, record in zip(questions, records, strict=True):
        prompt = tokenizer(question.prompt).input_ids
        scores = []
        for text in question.continuations:
            ids = tokenizer(question.prompt + text).input_ids
            with torch.no_grad():
                logps = subject.model(torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(logps[at - 1, ids[at]].item() for at in range(len(prompt), len(ids))))
        assert record["correct"] == (scores[question.answer] == max(scores))
    (accuracy,) = metrics(records)
    assert accuracy["name"] == "utility.mmlu"
    assert "0.33" in accuracy["budget"]
    (open_answer,) = open_metrics(ask_open({"candidate": subject}, "mmlu", questions[:2], max_new_tokens=3))
    assert open_answer["name"] == "utility.mmlu.open"


def test_a_judge_beside_the_rules(models, tmp_path):
    class Short:
        def score(self, prompts, completions, **columns):
            assert set(columns["kind"]) == {"forget", "neighbour", "retain"}
            return [None if kind == "retain" else float(len(said) % 7) for said, kind in
                    zip(completions, columns["kind"], strict=True)]  # fmt: skip

    class Broken:
        def score(self, prompts, completions, **columns):
            return [float("nan")] * len(completions)

    def audit(judge):
        return run_audit(models / "candidate", suite="direct", out=tmp_path / "a", base=str(models / "base"), say=quiet,
                         judge=judge, **DATA)  # fmt: skip

    found = {each["name"]: each for each in audit(Short()).summary["metrics"]}
    assert 0 <= found["forget.judge"]["candidate"] <= 6
    assert "neighbours.judge" in found
    with pytest.raises(UserError, match="nan"):
        audit(Broken())


def test_paraphrases_keep_names_and_are_other_words(models, tmp_path):
    question = "Where was Thessaly Brandwick born in 1861?"
    good = "Where did Thessaly Brandwick's life begin in 1861?"
    said = [good, question, "where was thessaly brandwick born, in 1861", "Where was she born?", ""]
    assert useful(question, said) == said[:1]
    config = BaseModelConfig(model_name_or_path=str(models / "base"), load_in_4bit=False)
    with pytest.raises(UserError, match="of use"):
        write_paraphrases("builtin:chronicle@forget[:2]", tmp_path / "p.jsonl", config, max_new_tokens=2, say=quiet)
    assert not (tmp_path / "p.jsonl").exists()
    (tmp_path / "p.jsonl").write_text("mine")
    with pytest.raises(UserError, match="exists"):
        write_paraphrases("builtin:chronicle@forget[:2]", tmp_path / "p.jsonl", config, say=quiet)


def test_paraphrases_become_a_column(models, tmp_path, monkeypatch):
    def said(model, tokenizer, prompts, **settings):
        assert "other words" in tokenizer.decode(prompts[0])
        return [Generated([1], f"In which place was Thessaly Brandwick born, take {at}?", True)
                for at in range(len(prompts))]  # fmt: skip

    monkeypatch.setattr("align_unlearn.audit.paraphrases.generate", said)
    config = BaseModelConfig(model_name_or_path=str(models / "base"), load_in_4bit=False)
    file = write_paraphrases("builtin:chronicle@forget[1:2]", tmp_path / "p.jsonl", config, per_row=2, say=quiet)
    (example,) = read_examples(str(file))
    assert len(example.paraphrases) == 3, "its own one and two"
    assert example.completion
