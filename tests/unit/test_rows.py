"""From data sets to trainer rows: own answers, and pairs in both directions."""

from dataclasses import replace

import pytest

from align_unlearn.config import Job
from align_unlearn.errors import UserError
from align_unlearn.training.rows import JobData, read_job_data, refusal_rows, text_rows, with_own_answers

JOB = Job(
    objective="dpo",
    forget_dataset="builtin:harmful@heldout",
    neighbour_dataset="builtin:lookalikes@heldout",
    retain_dataset="builtin:everyday@heldout",
    answer_tokens=5,
)


@pytest.fixture
def data(tokenizer, model, tmp_path) -> JobData:
    read = read_job_data(JOB, tokenizer, retain_term=True)
    few = replace(read, forget=read.forget[:3], neighbours=read.neighbours[:3], retain=read.retain[:3])
    return with_own_answers(few, JOB, model, tokenizer, seed=1, cache=tmp_path / "own.jsonl")


def test_own_answers_fill_what_has_none_and_come_from_the_cache(data, tokenizer, tmp_path):
    assert all(example.completion for example in [*data.forget, *data.neighbours, *data.retain])
    assert not all(example.ends for example in data.forget), "an answer cut at 5 tokens does not end"
    few = replace(data, forget=[replace(each, completion=None, ends=True) for each in data.forget],
                  neighbours=[replace(each, completion=None, ends=True) for each in data.neighbours],
                  retain=[replace(each, completion=None, ends=True) for each in data.retain])  # fmt: skip
    again = with_own_answers(few, JOB, None, tokenizer, seed=1, cache=tmp_path / "own.jsonl")
    assert again == data


def test_an_online_run_has_answers_in_retain_rows_only(data, model, tokenizer, tmp_path):
    asked = replace(data, forget=[replace(each, completion=None) for each in data.forget],
                    neighbours=[replace(each, completion=None) for each in data.neighbours],
                    retain=[replace(each, completion=None) for each in data.retain])  # fmt: skip
    online = replace(JOB, objective="rloo")
    filled = with_own_answers(asked, online, model, tokenizer, seed=1, cache=tmp_path / "online.jsonl")
    assert all(each.completion is None for each in [*filled.forget, *filled.neighbours])
    assert all(each.completion for each in filled.retain)


def test_pairs_in_both_directions(data, tokenizer):
    rows = refusal_rows(data, tokenizer, 512, seed=3, refusals_per_row=2)
    assert len(rows) == 3 * 2 + 3
    eos = tokenizer.eos_token_id
    refusals = set(data.refusals)
    for row in list(rows)[:6]:
        chosen = tokenizer.decode(row["chosen_ids"])
        assert chosen.removesuffix("<|im_end|>") in refusals
        assert row["chosen_ids"].count(eos) == 1
    for row, example in zip(list(rows)[6:], data.neighbours, strict=True):
        assert tokenizer.decode(row["rejected_ids"]).removesuffix("<|im_end|>") in refusals
        assert (row["chosen_ids"][-1] == eos) == example.ends, "a cut answer teaches no early end"
    first, second = rows[0], rows[1]
    assert first["prompt_ids"] == second["prompt_ids"]
    assert first["chosen_ids"] != second["chosen_ids"]


def test_too_many_refusals_a_row(data, tokenizer):
    with pytest.raises(UserError, match="refusals_per_row"):
        refusal_rows(data, tokenizer, 512, seed=3, refusals_per_row=99)


def test_neighbours_are_kept_where_the_objective_has_no_pairs(data, tokenizer):
    forget, retain = text_rows(data, tokenizer, 512)
    assert (len(forget), len(retain)) == (3, 6)


def test_no_forget_set_and_no_retain_set(tokenizer):
    with pytest.raises(UserError, match="forget_dataset"):
        read_job_data(Job(), tokenizer, retain_term=True)
    with pytest.raises(UserError, match="--retain none"):
        read_job_data(Job(forget_dataset="builtin:harmful"), tokenizer, retain_term=True)
