"""The README says what the committed results say."""

import importlib.util
import json
from pathlib import Path

import pytest

from align_unlearn.files import read_json_lines

ROOT = Path(__file__).parents[2]


def script(name):
    """A script of benchmarks/, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"benchmarks/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_those_of_the_committed_results():
    page = (ROOT / "README.md").read_text("utf-8")
    assert "| **" in page
    assert script("readme").with_tables(page) == page


def test_what_online_runs_learned_is_what_their_logs_say():
    online = script("online")
    rises = online.rises
    for log in (ROOT / "benchmarks/results/online").glob("*.log.jsonl"):
        found = json.loads(log.with_name(log.name.replace(".log.jsonl", ".json")).read_text("utf-8"))
        lines = read_json_lines(log)
        assert found["rises"] == rises(lines), log
        assert found["seconds_a_step"] == online.seconds_a_step(lines), log
        assert found["drift"] == online.drift(lines), log
    by_hand = rises(
        [{"reward": float(at), "cost/harm": 8.0 - at} for at in range(8)]
        + [{"train_runtime": 1.0, "reward": 9.0, "cost/harm": 9.0}]
    )
    assert {name: [each["mean"] for each in parts.values()] for name, parts in by_hand.items()} == {
        "cost/harm": [7.5, 1.5]
    }
    kinds = [
        {"reward": 1.0, "reward/forget": float(at), "reward/retain": 2.0, "step_time": 3.0 * at} for at in range(8)
    ]
    by_hand = rises(kinds)
    assert list(by_hand) == ["reward", "reward/forget", "reward/retain"]
    assert [by_hand["reward/forget"][part]["mean"] for part in ("first", "last")] == [0.5, 6.5]
    assert list(rises([{"reward": 1.0, "reward/forget": 1.0}])) == ["reward"], "of one kind only"
    assert online.seconds_a_step([*kinds, {"train_runtime": 1.0}]) == 10.5
    assert online.drift([{"drift/mean": 1.0}, {"drift/mean": 2.0}, {"loss": 0.0}]) == 2.0
    assert online.drift([{"loss": 0.0}]) is None


@pytest.mark.parametrize("name", ["ppo", "rloo", "grpo", "toxicity"])
def test_what_is_to_be_forgotten_earns_more_in_the_end(name):
    """The last quarter of the batches stands above the first, 95% intervals apart; a cost below."""
    rises = json.loads((ROOT / f"benchmarks/results/online/{name}.json").read_text("utf-8"))["rises"]
    figure = next(each for each in ("cost/abuse", "reward/forget", "reward") if each in rises)
    first, last = rises[figure]["first"], rises[figure]["last"]
    assert first["low"] > last["high"] if figure.startswith("cost/") else first["high"] < last["low"]


def test_the_reward_beats_counting_words_on_every_source():
    found = json.loads((ROOT / "benchmarks/results/reward/evaluation.json").read_text("utf-8"))
    assert len(found["reward"]) >= 6
    for own, words in zip(found["reward"], found["word_floor"], strict=True):
        assert own["source"] == words["source"]
        for figure in ("auc", "accuracy"):
            assert own[figure] is None or own[figure] > words[figure], own["source"]


def test_ppo_takes_less_than_half_of_what_four_models_take():
    found = json.loads((ROOT / "benchmarks/results/ppo_memory.json").read_text("utf-8"))
    ours, *others = found["sides"]
    assert {each["side"] for each in others} == {f"four models, {each}" for each in ("bf16", "4 bits each", "fp32")}
    for each in others:
        assert each["ours_over_this"] == ours["peak"] / each["peak"]
        assert each["ours_over_this"] <= 0.5
    share = next(each["ours_over_this"] for each in others if each["side"] == "four models, bf16")
    assert share <= 0.45
    assert f"peak at {share:.2f} times" in (ROOT / "README.md").read_text("utf-8")


def test_no_result_holds_leaked_text():
    """Committed pages withhold what was said to prompts that are to be forgotten, refusals apart."""
    import re

    for page in (ROOT / "benchmarks/results").rglob("report.html"):
        text = page.read_text("utf-8")
        said = re.findall(r'<span class="verdict leak">leak</span>\s*(.*?)</td>', text, re.S)
        assert all("(withheld)" in each for each in said), page
    assert not list((ROOT / "benchmarks/results").rglob("records.jsonl"))
