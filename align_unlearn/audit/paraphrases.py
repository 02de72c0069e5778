"""Paraphrases that a model writes, as a column of the rows, for the probe `paraphrase`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from align_unlearn.config import BaseModelConfig
from align_unlearn.data.examples import Example, read_examples
from align_unlearn.data.sources import read_rows
from align_unlearn.data.tokens import prompt_ids
from align_unlearn.errors import UserError
from align_unlearn.files import write_json_lines
from align_unlearn.judge import words
from align_unlearn.modeling.generate import generate
from align_unlearn.modeling.load import load_base
from align_unlearn.modeling.tokenizer import load_tokenizer

REQUEST = "Say the following in other words. Keep its meaning, its names and its numbers, and write nothing else.\n\n{}"


def write_paraphrases(
    source: str,
    to: Path,
    config: BaseModelConfig,
    *,
    per_row: int = 3,
    temperature: float = 0.8,
    max_new_tokens: int = 60,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> Path:
    """Writes the rows of `source` to `to` (JSON lines), each with a column `paraphrases`.

    Args:
        source: rows with questions.
        to: a new file.
        config: the model that writes them.
        per_row: how many are asked for; those of no use are left out.
        temperature: of sampling.
        max_new_tokens: longest paraphrase.
        seed: of sampling.
        say: called with a line at the end.

    Raises:
        UserError: the file exists, a row is no question, or nothing of use came.
    """
    if to.exists():
        raise UserError("The file exists already.", where=str(to), fix="another --to")
    tokenizer = load_tokenizer(config.model_name_or_path or "", revision=config.model_revision)
    rows, examples = read_rows(source), read_examples(source, tokenizer)
    asked = [prompt_ids(tokenizer, _request(each)) for each in examples for _ in range(per_row)]
    said = generate(
        load_base(config), tokenizer, asked, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
        title="paraphrases",
    )  # fmt: skip
    made = []
    for at, (row, example) in enumerate(zip(rows, examples, strict=True)):
        own = [each.text for each in said[at * per_row : (at + 1) * per_row] if each.finished]
        made.append({**row.columns, "paraphrases": useful(example.question, own)})
    count = sum(len(row["paraphrases"]) for row in made)
    if not count:
        raise UserError(f"None of {len(said)} paraphrases is of use.", where=source, fix="a larger model")
    write_json_lines(to, made)
    say(f"{count} paraphrases of {len(made)} rows in {to} ({len(said) - count} left out)")
    return to


def useful(question: str, paraphrases: Sequence[str]) -> list[str]:
    """Those that are other words than the question's and each other's, and keep its names and numbers."""
    kept: list[str] = []
    seen = {" ".join(words(question))}
    names = {word.strip("?.,!'\"") for word in question.split()[1:] if word[:1].isupper() or word[:1].isdigit()}
    for text in paraphrases:
        same = " ".join(words(text))
        if same and same not in seen and all(name in text for name in names - {"I", ""}):
            seen.add(same)
            kept.append(text.strip())
    return kept


def _request(example: Example) -> Example:
    if isinstance(example.prompt, str):
        raise UserError("A paraphrase needs a question, not a passage.", where=example.where)
    return replace(example, prompt=[{"role": "user", "content": REQUEST.format(example.question)}])
