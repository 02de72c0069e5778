"""TOFU's figures against closed forms; against the published logs where they lie beside the checkout."""

import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align_unlearn.audit.tofu import TofuRow, forget_quality, model_utility, read_published, utility_parts
from align_unlearn.errors import UserError


def row(loss=1.0, paraphrase=1.2, wrong=(2.0, 3.0), rouge=0.5):
    return TofuRow(loss, paraphrase, tuple(wrong), rouge)


def test_row_figures():
    each = row()
    assert each.probability == pytest.approx(math.exp(-1))
    assert each.normalised_probability == pytest.approx(math.exp(-1) / (math.exp(-1) + math.exp(-2) + math.exp(-3)))
    assert each.truth_ratio == pytest.approx(math.sqrt(math.exp(-2) * math.exp(-3)) / math.exp(-1.2))


def test_utility_is_the_harmonic_mean_of_nine():
    evaluation = {name: [row(), row(0.5)] for name in ("retain", "real_authors", "world_facts")}
    parts = utility_parts(evaluation)
    assert len(parts) == 9
    assert parts["retain.probability"] == pytest.approx((math.exp(-1) + math.exp(-0.5)) / 2)
    assert model_utility(evaluation) == pytest.approx(9 / sum(1 / each for each in parts.values()))
    evaluation["world_facts"] = [row(rouge=0.0)]
    assert model_utility(evaluation) == 0.0
    with pytest.raises(UserError, match="world_facts"):
        model_utility({name: evaluation[name] for name in ("retain", "real_authors")})


@given(st.lists(st.floats(0, 10), min_size=2, max_size=30))
def test_a_model_that_is_the_retained_one_has_forget_quality_one(losses):
    rows = {"forget": [row(paraphrase=each) for each in losses]}
    assert forget_quality(rows, rows) == pytest.approx(1.0)


def test_forget_quality_falls_as_the_models_part():
    near = {"forget": [row(paraphrase=at / 40) for at in range(40)]}
    far = {"forget": [row(paraphrase=3 + at / 40) for at in range(40)]}
    # no overlap: the exact two-sided p value is 2 / C(80, 40)
    assert forget_quality(near, far) == pytest.approx(2 / math.comb(80, 40), rel=1e-6)
    with pytest.raises(UserError, match="both models"):
        forget_quality(near, {})


def test_published_form(tmp_path):
    log = {"avg_gt_loss": {"0": 1.0}, "avg_paraphrased_loss": {"0": 1.2}, "average_perturb_loss": {"0": [2.0, 3.0]},
           "rougeL_recall": {"0": 0.5}}  # fmt: skip
    names = ("eval_log_forget", "eval_log", "eval_real_author_wo_options", "eval_real_world_wo_options")
    (tmp_path / "log.json").write_text(json.dumps({f"{name}.json": log for name in names}))
    assert read_published(tmp_path / "log.json")["forget"] == [row()]
    (tmp_path / "log.json").write_text("{}")
    with pytest.raises(UserError, match="not a published"):
        read_published(tmp_path / "log.json")


@pytest.mark.skipif("TOFU_PUBLISHED" not in os.environ, reason="TOFU_PUBLISHED names a folder of the benchmark's logs")
def test_published_figures():
    folder = Path(os.environ["TOFU_PUBLISHED"])
    full, retained = (read_published(folder / f"phi_{name}_wd0.01.json") for name in ("full", "retain90"))
    assert forget_quality(full, retained) == pytest.approx(2.1943e-16, rel=1e-4)
    assert model_utility(full) == pytest.approx(0.5221, abs=5e-5)
    assert model_utility(retained) == pytest.approx(0.5320, abs=5e-5)
