"""The model's own alternative answers as chosen ones, for `altpo` (Mekala et al. 2024, arXiv:2409.13474).

Each question of a set is asked again with the request for a different, made-up answer. What comes back becomes
`chosen`, the row's own answer `rejected`; the rows are written to a file that a recipe names as its forget set.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from align_unlearn.config import BaseModelConfig
from align_unlearn.data.examples import Example, read_examples
from align_unlearn.data.tokens import prompt_ids
from align_unlearn.errors import UserError
from align_unlearn.files import read_json_lines, sha256_of, write_json, write_json_lines
from align_unlearn.modeling.generate import generate
from align_unlearn.modeling.load import base_fingerprint, load_base, pinned, precision_name
from align_unlearn.modeling.tokenizer import load_tokenizer

REQUEST = (
    "Here is a question and its true answer. Write another answer of the same form and about the same length that "
    "sounds just as plausible but states different facts. Give the answer alone.\n\nQuestion: {question}\n"
    "True answer: {answer}"
)


def write_alternatives(
    source: str,
    to: Path,
    config: BaseModelConfig,
    *,
    per_row: int = 1,
    temperature: float = 1.0,
    max_new_tokens: int = 80,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> Path:
    """Writes rows of `prompt`, `chosen`, `rejected` to `to` (JSON lines).

    The file is its own cache: a note beside it says what it was made from, and the same request finds it done.

    Args:
        source: rows with a question and an answer.
        to: the file.
        config: the model that answers.
        per_row: how many alternatives each question gets, each in a row of its own.
        temperature: of sampling.
        max_new_tokens: longest alternative.
        seed: of sampling.
        say: called with a line for each stage.

    Raises:
        UserError: a row has no answer or no chat prompt, the file was made from something else, or no alternative is
            of use.
    """
    config = pinned(config)
    tokenizer = load_tokenizer(config.model_name_or_path or "", revision=config.model_revision)
    examples = read_examples(source, tokenizer)
    requests = [prompt_ids(tokenizer, request(each)) for each in examples for _ in range(per_row)]
    made_from = sha256_of(
        [base_fingerprint(config), precision_name(config), requests, temperature, max_new_tokens, seed]
    )
    note = to.with_name(to.name + ".source.json")
    if to.exists():
        if note.is_file() and json.loads(note.read_text("utf-8")).get("made_from") == made_from:
            say(f"{to} holds these {len(read_json_lines(to))} rows already")
            return to
        raise UserError("The file exists and was made from something else.", where=str(to), fix="another --to")
    model = load_base(config)
    said = generate(
        model,
        tokenizer,
        requests,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        title="alternative answers",
    )
    texts = [answer.text if answer.finished else "" for answer in said]
    rows = paired([each for each in examples for _ in range(per_row)], texts)
    if not rows:
        raise UserError(
            f"None of {len(said)} alternatives ended within {max_new_tokens} tokens and differs from the true answer.",
            where=source,
        )
    write_json(note, {"made_from": made_from, "source": source, "model": config.model_name_or_path})
    write_json_lines(to, rows)
    say(f"{len(rows)} rows in {to} ({len(said) - len(rows)} left out: empty, cut off, or the true answer itself)")
    return to


def request(example: Example) -> Example:
    """The row's question, asked for a different answer.

    Raises:
        UserError: the row is plain text, or has no answer.
    """
    if isinstance(example.prompt, str) or example.completion is None:
        raise UserError("An alternative needs a question (as a chat) and its answer.", where=example.where)
    asked = REQUEST.format(question=example.question, answer=example.completion)
    return replace(example, prompt=[*example.prompt[:-1], {"role": "user", "content": asked}])


def paired(examples: Sequence[Example], alternatives: Sequence[str]) -> list[dict[str, Any]]:
    """Preference rows; an alternative that is empty or the true answer itself is left out."""
    return [
        {"id": f"{example.id} / {at}", "prompt": example.prompt, "chosen": text, "rejected": example.completion}
        for at, (example, text) in enumerate(zip(examples, alternatives, strict=True))
        if text.strip() and text.strip() != str(example.completion).strip()
    ]
