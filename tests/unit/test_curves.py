"""Learning curves of an online run, from its log."""

import json
import re

from align_unlearn.report.curves import write_curves


def test_curves_show_the_reward_beside_the_judge_that_only_watches(tmp_path):
    lines = [
        {"step": at, "reward/forget": at / 10, "heldout/forget": 1 - at / 10, "reward/neighbour": 0.0, "kl": None,
         "drift/mean": 0.01 * at, "verdict/forget/refuse": at / 10, "verdict/neighbour/refuse": 0.0}
        for at in range(6)
    ]  # fmt: skip
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [{"step": 0, "loss": 1.0}, *lines]))
    page = write_curves(tmp_path)
    assert page == tmp_path / "curves.svg"
    text = page.read_text()
    assert text.startswith("<svg")
    for word in ("to be forgotten", "held-out judge (dashed)", "refuse, look-alikes", "KL on retained"):
        assert word in text
    assert "everyday" not in text


def test_a_panel_without_figures_is_left_out_and_the_summary_is_no_step(tmp_path):
    line = {"step": 1, "reward/forget": 0.5, "verdict/forget/leak": 1.0, "drift/mean": 0.02}
    log = [line, line | {"step": 2}, {"step": 2, "train_runtime": 9.0, "drift/mean": 600.0}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(each) + "\n" for each in log))
    text = write_curves(tmp_path).read_text()
    assert "elsewhere" not in text
    assert "held-out" not in text
    assert not re.search(r">\s*[12]\d\d\s*<", text)  # no tick of a mean that it takes part in


def test_a_run_without_rollouts_has_none(tmp_path):
    assert write_curves(tmp_path) is None
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    assert write_curves(tmp_path) is None
