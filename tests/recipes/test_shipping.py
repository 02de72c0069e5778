"""Shipping from end to end: what survives, and a process that has nothing of ours."""

import itertools
import json

import pytest

from align_unlearn.audit.run import run_audit
from align_unlearn.audit.subjects import open_subjects
from align_unlearn.data.examples import read_examples
from align_unlearn.errors import Refused, UserError
from align_unlearn.export.merge import merge
from align_unlearn.export.serving_check import check_serving
from align_unlearn.export.survive import exports_of, survive, table
from align_unlearn.report.html import write_report
from align_unlearn.report.survival import write_survival_page
from align_unlearn.training.job import train
from align_unlearn.training.recipe import load_recipe

SETTINGS = (
    "--forget_dataset builtin:chronicle@forget --retain_dataset builtin:chronicle@retain --max_steps 3 "
    "--learning_rate 3e-2 --save_strategy no --max_length 512 --audit_limit 3 --audit_tokens 6 --disable_tqdm true"
)


def quiet(line):
    """Nothing is printed in tests."""


@pytest.fixture
def run(tiny, tmp_path):
    words = ["--model_name_or_path", str(tiny), "--output_dir", str(tmp_path / "run"), *SETTINGS.split()]
    return train(load_recipe(None, words), say=quiet)


def test_a_folder_is_asked_where_nothing_of_ours_is(run, tmp_path, monkeypatch):
    merged = merge(run.path, tmp_path / "out", dtype="float32", say=quiet)
    served = json.loads((merged.folder / "manifest.json").read_text())["serving"]
    assert served == {"prompts": 6, "same_answers": 1.0, "same_verdicts": 1.0}
    for precision in ("nf4", "int8", "q8_0"):
        folder = merge(run.path, tmp_path / precision, precision=precision, force=True, say=quiet).folder
        served = json.loads((folder / "manifest.json").read_text())["serving"]
        assert served["prompts"] == 6
        assert served["same_verdicts"] >= 0.9
        assert served["same_answers"] >= (0.9 if precision == "q8_0" else 0.5)
    subject = open_subjects(merged.folder)["candidate"]
    rows = [("forget", row) for row in read_examples("builtin:chronicle@forget[:2]")]
    with monkeypatch.context() as judged:
        verdicts = itertools.count()
        judged.setattr("align_unlearn.export.serving_check.verdict_on", lambda *_: next(verdicts))
        with pytest.raises(Refused, match="100% of the answers are the same, and 0% are judged alike"):
            check_serving(merged.folder, subject, subject.tokenizer, rows, "float32", trust_remote_code=False)
    (merged.folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(Refused, match="rendered otherwise"):
        check_serving(merged.folder, subject, subject.tokenizer, rows, "float32", trust_remote_code=False)
    (merged.folder / "config.json").write_text("{")
    with pytest.raises(Refused, match="does not serve"):
        check_serving(merged.folder, subject, subject.tokenizer, rows, "float32", trust_remote_code=False)


def test_a_gguf_export_is_measured_as_its_file_is_read(run, tmp_path):
    """Embeddings too: the figures in memory are those of the folder that merge writes."""
    exports = exports_of(["dequantised"], ["f16", "q8_0", "q4_0"], ["nearest"])
    found = json.loads(survive(run.path, exports, say=quiet).read_text())["exports"]
    assert [each["precision"] for each in found] == ["f16", "q8_0", "q4_0"]
    for own in found:
        folder = tmp_path / own["precision"]
        merged = merge(run.path, folder, precision=own["precision"], rounding="nearest", force=True, say=quiet)
        for figure in ("kl_retain", "kl_forget"):
            assert own[figure] == pytest.approx(getattr(merged.survival, figure), rel=0.02, abs=1e-6), own["name"]
        assert own["export"]["log_probability"] == pytest.approx(merged.survival.export.log_probability, rel=1e-4)
    page = write_report(run_audit(run.path, say=quiet).folder).read_text()
    assert "What survives shipping" in page, "the audit's page has it too"
    assert "dequantised → q4_0, nearest" in page
    (run.path / "survival/survival.json").write_text("{")
    with pytest.raises(UserError, match="no JSON"):
        write_report(run.path)


def test_survival_is_measured_for_every_way_of_shipping(run, tmp_path):
    exports = exports_of(["dequantised", "original16"], ["bfloat16", "nf4"], ["nearest", "tuned"])
    assert len(exports) == 6
    survive(run.path, exports[:1], out=tmp_path / "out", say=quiet)
    file = survive(run.path, exports, out=tmp_path / "out", say=quiet)
    found = {each["name"]: each for each in json.loads(file.read_text())["exports"]}
    whole, snapped = found["dequantised → bfloat16"], found["dequantised → nf4, nearest"]
    assert whole["kl_retain"] < snapped["kl_retain"]
    assert found["dequantised → nf4, tuned"]["kl_retain"] < snapped["kl_retain"]
    layers = whole["layers"]
    assert len(layers) == 14
    assert all(each["share"] == pytest.approx(1.0, abs=0.2) for each in layers.values())
    page = write_survival_page(tmp_path / "out").read_text()
    assert "original16 → nf4, tuned" in page
    assert "By layer" in page
    assert "Seed 42, <code>align-unlearn survive" in page
    assert "Share of the update" in page
    told = json.loads(file.read_text())
    assert told["command"].endswith("--precision bfloat16 --precision nf4 --rounding nearest --rounding tuned")
    assert told["seed"] == 42
    assert "dequantised → nf4, nearest" in table(list(found.values()))
    said = []
    survive(run.path, exports[::-1], out=tmp_path / "out", say=said.append)
    assert len(said) == 6
    assert all(line.endswith("measured before") for line in said)
    assert json.loads(file.read_text())["exports"] == list(found.values())
    with pytest.raises(UserError, match="nf4"):
        exports_of(["dequantised"], ["nf5"], ["nearest"])
    with pytest.raises(UserError, match="nothing to be lost"):
        exports_of(["dequantised", "adapter"], ["nf4"], ["nearest"])
    with pytest.raises(UserError, match=r"survival.json"):
        write_survival_page(tmp_path)
