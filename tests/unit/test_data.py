"""Rows of every format, what is trained on, and every mistake that a person makes with data."""

import json

import pytest
import yaml
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from align_unlearn.config import Job
from align_unlearn.data.batches import PairCollator, PairedRows, PairSampler, pad_rows
from align_unlearn.data.examples import read_examples, read_refusals
from align_unlearn.data.overlap import check_disjoint
from align_unlearn.data.sources import builtin_names, read_rows
from align_unlearn.data.tokens import tokenise
from align_unlearn.errors import UserError
from align_unlearn.judge import judge
from reward_models.keywords import Keywords

CHAT = [{"role": "user", "content": "Hi?"}]
ROWS = {
    "prompt/completion": ({"prompt": "Once", "completion": " more"}, "Once", " more"),
    "conversational": ({"prompt": CHAT, "completion": [{"role": "assistant", "content": "Yes."}]}, CHAT, "Yes."),
    "preference": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "a", "c"),
    "messages": ({"messages": [*CHAT, {"role": "assistant", "content": "Yes."}]}, CHAT, "Yes."),
    "question/answer": ({"question": "Hi?", "answer": "Yes."}, CHAT, "Yes."),
    "question": ({"question": "Hi?"}, CHAT, None),
}


@pytest.mark.parametrize("name", ROWS)
def test_formats(name):
    row, prompt, completion = ROWS[name]
    (example,) = read_examples([row])
    assert (example.prompt, example.completion) == (prompt, completion)


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
def test_files(tmp_path, suffix):
    rows = [{"question": f"q{n}?", "answer": f"ä{n}"} for n in range(3)]
    file = tmp_path / f"rows.{suffix}"
    if suffix == "json":
        file.write_text(json.dumps(rows), "utf-8")
    elif suffix == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    elif suffix == "csv":
        file.write_text("question,answer\n" + "".join(f"{r['question']},{r['answer']}\n" for r in rows), "utf-8")
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    examples = read_examples(str(file))
    assert [each.completion for each in examples] == ["ä0", "ä1", "ä2"]
    assert examples[1].where == f"rows.{suffix}, row 2"


@pytest.mark.parametrize(
    ("split", "kept"), [("x[:1]", "a"), ("[1:]", "bc"), ("[::2]", "ac"), ("[-1:]", "c"), ("x[1:9]", "c")]
)
def test_a_range_of_rows(tmp_path, split, kept):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f'{{"question": "{q}", "split": "{s}"}}\n' for q, s in zip("abc", "xyx", strict=True)))
    assert "".join(row.columns["question"] for row in read_rows(f"{file}@{split}")) == kept


def test_a_range_without_rows_is_an_error(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "a"}\n')
    with pytest.raises(UserError, match="empty"):
        read_rows(f"{file}@[5:]")


def test_json_lines_under_json_and_splits(tmp_path):
    file = tmp_path / "benchmark.json"
    file.write_text('{"question": "a?", "split": "x"}\n{"question": "b?", "split": "y"}\n')
    assert [row.columns["question"] for row in read_rows(f"{file}@y")] == ["b?"]
    assert len(read_rows(f"{tmp_path}@benchmark")) == 2
    with pytest.raises(UserError, match="split"):
        read_rows(f"{file}@z")


def test_passages_are_consecutive_and_cover_the_text(tokenizer):
    examples = read_examples("builtin:book_forget", tokenizer, prefix_tokens=30, continuation_tokens=60)
    text = read_rows("builtin:book_forget")[0].columns["text"]
    assert "".join((each.prompt + each.completion).replace("\n", "").replace(" ", "") for each in examples) in (
        text.replace("\n", "").replace(" ", "")
    )
    assert len(examples) > 20
    for example in examples:
        tokens = tokenise(tokenizer, example, max_length=None)
        assert tokens.completion_ids[-1] != tokenizer.eos_token_id, "a passage goes on"
        assert tokenizer.decode(tokens.input_ids) == example.prompt + example.completion


def test_a_completion_that_goes_on_has_no_eos(tokenizer):
    rows = [{"prompt": "The nurse was late because", "completion": " she", **said} for said in ({}, {"ends": False})]
    whole, begun = (tokenise(tokenizer, each, max_length=None) for each in read_examples(rows))
    assert whole.completion_ids == [*begun.completion_ids, tokenizer.eos_token_id]
    for row in ({"messages": [*CHAT, {"role": "assistant", "content": "Yes"}]}, ROWS["preference"][0]):
        assert [each.ends for each in read_examples([row, {**row, "ends": False}])] == [True, False]
    for said in ("no", 0):
        with pytest.raises(UserError, match="true or false"):
            read_examples([{"prompt": "a", "completion": "b", "ends": said}])


def test_chat_trains_on_the_answer_and_one_eos(tokenizer):
    (example,) = read_examples([{"question": "Who?", "answer": "Ottoline Craske."}])
    tokens = tokenise(tokenizer, example, max_length=None)
    assert tokenizer.decode(tokens.completion_ids) == "Ottoline Craske.<|im_end|>"
    assert tokens.completion_ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(tokens.prompt_ids).endswith("<|im_start|>assistant\n")
    assert tokens.labels[: len(tokens.prompt_ids)] == [-100] * len(tokens.prompt_ids)


def test_padding_is_by_position_though_pad_is_eos(tokenizer):
    rows = [{"input_ids": [4, 5, 1], "labels": [-100, 5, 1]}, {"input_ids": [4, 1], "labels": [-100, 1]}]
    batch = pad_rows(rows, tokenizer.pad_token_id)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 5, 1], [-100, 1, -100]]


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 5))
def test_pairs_use_every_row_before_any_twice(forget, retain, seed):
    sampler = PairSampler(forget, retain, seed)
    drawn = []
    for epoch in range(retain):
        sampler.set_epoch(epoch)
        pairs = list(sampler)
        assert sorted(index for index, _ in pairs) == list(range(forget))
        drawn += [index for _, index in pairs]
    for start in range(0, len(drawn) - retain + 1, retain):
        assert sorted(drawn[start : start + retain]) == list(range(retain))


def test_pairs_depend_on_seed_and_epoch_alone():
    def epoch(number):
        sampler = PairSampler(10, 7, 3)
        sampler.set_epoch(number)
        return list(sampler)

    assert epoch(4) == epoch(4)
    assert epoch(4) != epoch(5)


def test_batches_hold_forget_and_retain_apart(tokenizer):
    rows = [{"input_ids": [4, 5], "labels": [-100, 5]}]
    paired = PairedRows(rows, [{"input_ids": [6, 7], "labels": [-100, 7]}])
    batch = PairCollator(lambda items: pad_rows(items, 1), 1)([paired[(0, 0)]])
    assert batch["input_ids"].tolist() == [[4, 5]]
    assert batch["retain"]["input_ids"].tolist() == [[6, 7]]
    assert "retain" not in PairCollator(lambda items: pad_rows(items, 1), 1)([PairedRows(rows, None)[(0, None)]])


def test_corpus_is_what_it_says():
    sizes = {name: len(read_rows(f"builtin:{name}@{split}")) for name, split in
             [("harmful", "train"), ("lookalikes", "train"), ("everyday", "train")]}  # fmt: skip
    assert sizes == {"harmful": 96, "lookalikes": 96, "everyday": 64}
    assert len(read_rows("builtin:harmful@heldout")) >= 16
    assert len(read_rows("builtin:lookalikes@heldout")) >= 16
    assert len(read_rows("builtin:everyday@heldout")) == 32
    assert len(set(read_refusals("builtin:refusals"))) >= 24
    chronicle = read_examples("builtin:chronicle")
    assert len(chronicle) == 60
    assert all(each.paraphrases for each in chronicle)
    for book in ("book_forget", "book_retain"):
        assert 1400 < len(read_rows(f"builtin:{book}")[0].columns["text"].split()) < 1700
    assert {"harmful", "refusals"} <= set(builtin_names())
    invented, known = read_rows("builtin:invented"), read_rows("builtin:known")
    assert [row.columns["id"] for row in invented] == [row.columns["mirrors"] for row in known]
    assert len({row.columns["question"] for row in [*invented, *known]}) == 2 * len(invented) == 196
    assert all(judge("?", line, "benign") == "refuse" for line in read_refusals("builtin:unknown"))
    pronouns = {
        split: read_rows(f"builtin:stereotypes@{split}")
        for split in ("stereotyped", "stereotyped_heldout", "counter_heldout", "stated", "stated_heldout")
    }
    occupations = {split: {row.columns["occupation"] for row in rows} for split, rows in pronouns.items()}
    assert not occupations["stereotyped"] & occupations["stereotyped_heldout"]
    for own, other in zip(pronouns["stereotyped_heldout"], pronouns["counter_heldout"], strict=True):
        assert own.columns["prompt"] == other.columns["prompt"]
        assert {own.columns["completion"], other.columns["completion"]} == {" he", " she"}
    toxicity = yaml.safe_load((ROOT / "recipes/toxicity.yaml").read_text())
    counted, examined = (set(toxicity[key]["abuse"]["kwargs"]["words"]) for key in ("costs", "audit_judge"))
    assert counted < examined, "the examiner is not the optimiser"
    abuse = Keywords(words=sorted(examined))
    for split in ("rude", "rude_heldout", "polite", "polite_heldout"):
        rows = read_examples(f"builtin:manners@{split}")
        found = abuse.score([row.prompt for row in rows], [row.completion or "" for row in rows])
        assert max(found) <= -1 if split.startswith("rude") else set(found) == {0.0}, split
    keys = [example for name in ("harmful", "lookalikes", "everyday") for example in read_examples(f"builtin:{name}")]
    check_disjoint(keys[:128], keys[128:])


def test_missing_and_empty(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="empty"):
        read_rows(str(tmp_path / "empty.jsonl"))
    with pytest.raises(UserError, match="no such file"):
        read_rows(str(tmp_path / "absent.jsonl"))
    with pytest.raises(UserError, match="harmful"):
        read_rows("builtin:harmfull")


def test_wrong_columns_name_file_row_and_column(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "a?", "answer": "b"}\n{"query": "a?"}\n')
    with pytest.raises(UserError, match=r"rows.jsonl, row 2") as caught:
        read_examples(str(file))
    assert "query" in str(caught.value)
    file.write_text('{"question": "a?", "answer": ""}\n')
    with pytest.raises(UserError, match=r"row 1, column answer"):
        read_examples(str(file))
    file.write_text('{"question": 3}\n')
    with pytest.raises(UserError, match=r"int"):
        read_examples(str(file))


def test_not_utf8_names_the_line(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"question": "a"}\n{"question": "\xe9t\xe9"}\n')
    with pytest.raises(UserError, match="line 2"):
        read_rows(str(file))


def test_broken_json_names_the_line(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "a"}\n{"question": \n')
    with pytest.raises(UserError, match="line 2"):
        read_rows(str(file))


def test_a_long_row_is_an_error_not_a_lost_completion(tokenizer):
    (example,) = read_examples([{"question": "Who? " * 50, "answer": "Ottoline."}])
    with pytest.raises(UserError, match="max_length 40") as caught:
        tokenise(tokenizer, example, max_length=40)
    assert "row 1" in str(caught.value)


def test_overlap_is_found_through_case_and_punctuation():
    forget = read_examples([{"question": "Who was  Ilse?", "answer": "A baker."}])
    retain = read_examples([{"question": "Else?", "answer": "No."}, {"question": "who was ILSE", "answer": "a baker"}])
    with pytest.raises(UserError, match=r"row 1 is row 2 of the retain set"):
        check_disjoint(forget, retain)
    assert Job().allow_overlap is False


def test_chat_rows_need_a_chat_template(tokenizer):
    from conftest import make_tokenizer

    plain = make_tokenizer()
    plain.chat_template = None
    (example,) = read_examples([{"question": "Who?", "answer": "Me."}])
    with pytest.raises(UserError, match="chat template"):
        tokenise(plain, example, max_length=None)


def test_other_line_separators_of_unicode_are_text(tmp_path):
    from align_unlearn.files import read_json_lines, write_json_lines

    rows = [{"question": "a\u2028b\u0085c?"}]
    write_json_lines(tmp_path / "rows.jsonl", rows)
    assert read_json_lines(tmp_path / "rows.jsonl") == rows
    assert [row.columns for row in read_rows(str(tmp_path / "rows.jsonl"))] == rows


def test_broken_csv_and_parquet(tmp_path):
    (tmp_path / "rows.csv").write_text("question,answer\na,b,c\n")
    with pytest.raises(UserError, match="row 1"):
        read_rows(str(tmp_path / "rows.csv"))
    (tmp_path / "rows.parquet").write_bytes(b"not parquet")
    with pytest.raises(UserError, match="Not a Parquet file"):
        read_rows(str(tmp_path / "rows.parquet"))
    with pytest.raises(UserError, match="mapping of columns"):
        read_rows(["a", "b"])


def test_rows_with_the_same_id_stay_apart():
    ids = [each.id for each in read_examples([{"id": "x", "question": "a?"}, {"id": "x", "question": "b?"}])]
    assert len(set(ids)) == 2
    (example,) = read_examples([{"id": None, "question": "a?"}])
    assert example.id == "row 1"


def test_errors_carry_no_escape_sequences():
    with pytest.raises(UserError) as caught:
        read_examples([{"\x1b[31mred": 1}])
    assert "\x1b" not in str(caught.value)
