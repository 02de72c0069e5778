"""The README says what the committed results say."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_tables_are_those_of_the_committed_results():
    spec = importlib.util.spec_from_file_location("readme", ROOT / "benchmarks/readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (ROOT / "README.md").read_text("utf-8")
    assert "| **" in page
    assert module.with_tables(page) == page


def test_no_result_holds_leaked_text():
    """Committed pages withhold what was said to prompts that are to be forgotten, refusals apart."""
    import re

    for page in (ROOT / "benchmarks/results").rglob("report.html"):
        text = page.read_text("utf-8")
        said = re.findall(r'<span class="verdict leak">leak</span>\s*(.*?)</td>', text, re.S)
        assert all("(withheld)" in each for each in said), page
    assert not list((ROOT / "benchmarks/results").rglob("records.jsonl"))
