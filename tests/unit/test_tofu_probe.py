"""What TOFU measures on a model, against each answer read alone in float64 through the whole vocabulary."""

import json
import math

import pytest
import torch
from conftest import make_model
from rouge_score.rouge_scorer import RougeScorer

from align_unlearn.audit.subjects import Subject
from align_unlearn.audit.tofu_probe import drift, evaluate, losses, read_questions, recalls
from align_unlearn.errors import UserError

ROWS = [
    {"question": "Who wrote the book?", "answer": "Ada Lund wrote it.", "paraphrased_answer": "It is by Ada Lund.",
     "perturbed_answer": ["Bo Lund wrote it, long ago.", "Ada Holm wrote it."]},
    {"prompt": "Question: Where?\nAnswer:", "completion": " In Oslo", "perturbed_answer": " In the old town of Rome"},
]  # fmt: skip


def subject(tokenizer, seed=0):
    return Subject(f"seed {seed}", make_model(seed).eval(), tokenizer, "", "float32", str(seed))


@pytest.fixture
def questions(tmp_path):
    file = tmp_path / "tofu.json"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return read_questions(str(file))


def read_alone(model, tokenizer, question, answer):
    """(token log-probabilities, argmax hits) of one answer with its EOS, from the model's own logits in float64."""
    if isinstance(question.example.prompt, str):
        prompt = tokenizer(question.example.prompt).input_ids
    else:
        text = f"<|im_start|>user\n{question.example.question}<|im_end|>\n<|im_start|>assistant\n"
        prompt = tokenizer(text, add_special_tokens=False).input_ids
    ids = [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model.double()(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    logps = logits.log_softmax(-1)
    return logps[torch.arange(len(ids)), ids], logits.argmax(-1) == torch.tensor(ids), logps


def test_losses_are_means_over_the_answers_tokens(questions, tokenizer):
    found = losses(subject(tokenizer), questions, batch_size=3)
    for question, row in zip(questions, found, strict=True):
        alone = [-read_alone(make_model(), tokenizer, question, each)[0].mean().item() for each in question.answers]
        assert [row.answer_loss, row.paraphrase_loss, *row.perturbed_losses] == pytest.approx(alone, rel=1e-5)
        hits = read_alone(make_model(), tokenizer, question, question.answers[0])[1]
        assert row.exact_memorisation == pytest.approx(hits.double().mean().item())
        assert math.isnan(row.rouge_recall)
    assert questions[1].paraphrase == questions[1].answers[0]


def test_drift_is_the_exact_kl_to_the_base(questions, tokenizer):
    found = drift(subject(tokenizer, 1), subject(tokenizer), questions, batch_size=2)
    for question, kl in zip(questions, found, strict=True):
        base, other = (read_alone(make_model(seed), tokenizer, question, question.answers[0])[2] for seed in (0, 1))
        assert kl == pytest.approx((base.exp() * (base - other)).sum(-1).mean().item(), rel=1e-4)
    assert drift(subject(tokenizer), subject(tokenizer), questions) == pytest.approx([0, 0], abs=1e-6)


def test_recall_is_of_the_greedy_answer(questions, tokenizer):
    asked = subject(tokenizer)
    prompt = torch.tensor([tokenizer(questions[1].example.prompt).input_ids])
    ids = asked.model.generate(prompt, max_new_tokens=5, do_sample=False)[0, prompt.shape[1] :]
    answer = tokenizer.decode(ids, skip_special_tokens=True).strip()
    expected = RougeScorer(["rougeL"], use_stemmer=True).score(" In Oslo", answer)["rougeL"].recall
    assert recalls(asked, questions, max_new_tokens=5)[1] == pytest.approx(expected)
    rows = evaluate(asked, {"forget": questions}, max_new_tokens=5)["forget"]
    assert rows[1].rouge_recall == pytest.approx(expected)


def test_rows_without_wrong_answers_are_refused(tmp_path):
    file = tmp_path / "tofu.json"
    file.write_text('{"question": "Who?", "answer": "Me."}\n')
    with pytest.raises(UserError, match="wrong answers") as refused:
        read_questions(str(file))
    assert "row 1" in refused.value.where
