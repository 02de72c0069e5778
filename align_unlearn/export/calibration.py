"""The texts on which the rounding of a model that is to be shipped is calibrated.

The texts are the run's own training rows without those that are audited: each prompt with what the adapter model says
to it, and with its text, or what the original said. So requests come with refusals and with what is no longer said.
Beside them stand answers to prompts that the original makes up, for all that no row speaks of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align_unlearn.audit.sets import audited_sets
from align_unlearn.audit.subjects import Subject
from align_unlearn.config import Job
from align_unlearn.data.examples import Example, read_examples
from align_unlearn.data.tokens import Tokens, prompt_ids
from align_unlearn.export.made_up import made_up_prompts
from align_unlearn.files import sha256_of
from align_unlearn.modeling.generate import generate

ROWS = 64
"""Of each set."""
MADE_UP = 448
"""Prompts that the original makes up."""
NEW_TOKENS, MADE_UP_TOKENS = 40, 64
AT_ONCE = 64
"""Prompts that are answered in one batch: a step of a small one mostly waits for the weights."""
FEWEST = 8
"""With fewer rows left that are not audited, all are used."""


@dataclass(frozen=True)
class Text:
    """A text to calibrate on.

    Attributes:
        tokens: a prompt and what is said to it.
        forgotten: the run made it unlikely, and so it is to stay.
    """

    tokens: Tokens
    forgotten: bool = False


@dataclass(frozen=True)
class Calibration:
    """What rounding is calibrated on.

    Attributes:
        texts: prompts with what is said to them.
        audited: some of them are audited too, since the run names no held-out rows: figures are then of rows that the
            rounding has seen.
    """

    texts: list[Text]
    audited: bool


def calibration_texts(
    job: Job,
    subjects: Mapping[str, Subject],
    sets: Mapping[str, Sequence[Example]],
    earlier: Sequence[Job] = (),
) -> Calibration:
    """Prompts of the training sets, each with the adapter model's greedy answer and with the text that it was about.

    What was to be forgotten is among them: that it has become unlikely must be kept as much as what is said instead.

    Args:
        job: whose training sets are read.
        subjects: `candidate`, the adapter model, and `base`, whose answers stand in where rows have no text.
        sets: the audited ones, whose rows are left out.
        earlier: of runs beneath this one; what they were to forget is kept forgotten too.

    Raises:
        UserError: a set cannot be read.
    """
    tokenizer = subjects["candidate"].tokenizer
    speakers = {name: _plain(subjects[name]) for name in ("base", "candidate")}
    audited_too = [rows for own in earlier for rows in audited_sets(own, tokenizer).values()]
    seen = {_key(each) for rows in [*sets.values(), *audited_too] for each in rows}
    found, audited, chat = list[Text](), False, bool(tokenizer.chat_template)
    asked = [(job, source) for source in (job.forget_dataset, job.neighbour_dataset, job.retain_dataset)]
    for own, source in [*asked, *((each, each.forget_dataset) for each in earlier)]:
        if source:
            every = read_examples(
                source,
                tokenizer,
                prefix_tokens=own.prefix_tokens,
                continuation_tokens=own.continuation_tokens,
            )
            unseen = [each for each in every if _key(each) not in seen]
            examples = (unseen if len(unseen) >= FEWEST else every)[:ROWS]
            audited = audited or len(unseen) < FEWEST
            chat = chat and not any(isinstance(each.prompt, str) for each in examples)
            found += _with_answers(speakers, tokenizer, examples, source, forgotten=source == own.forget_dataset)
    prompts = made_up_prompts(speakers["base"], tokenizer, chat=chat, rows=MADE_UP, at_once=AT_ONCE)
    said = _said(speakers["candidate"], tokenizer, prompts, "adapter model: made-up prompts", MADE_UP_TOKENS)
    found += [Text(Tokens(prompt, ids)) for prompt, ids in zip(prompts, said, strict=True)]
    return Calibration(sorted(found, key=_length), audited)


def _plain(subject: Subject) -> Any:
    """A plain copy of the subject, which need not read its weights out of four bits for every token that it says."""
    return subject.plain(subject.model.get_input_embeddings().weight.dtype)


def _with_answers(
    speakers: Mapping[str, Any], tokenizer: Any, examples: Sequence[Example], source: str, *, forgotten: bool
) -> list[Text]:
    prompts = [prompt_ids(tokenizer, example) for example in examples]
    texts = [
        None if example.completion is None else list(tokenizer(example.completion, add_special_tokens=False).input_ids)
        for example in examples
    ]
    bare = [prompt for prompt, text in zip(prompts, texts, strict=True) if text is None]
    before = iter(_said(speakers["base"], tokenizer, bare, f"original: {source}") if bare else [])
    told = [next(before) if text is None else text for text in texts]
    said = _said(speakers["candidate"], tokenizer, prompts, f"adapter model: {source}")
    return [
        Text(Tokens(prompt, ids), forgotten and own is told and bool(ids))
        for own in (said, told)
        for prompt, ids in zip(prompts, own, strict=True)
    ]


def _said(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], title: str, tokens: int = NEW_TOKENS
) -> list[list[int]]:
    said = generate(model, tokenizer, prompts, max_new_tokens=tokens, batch_size=AT_ONCE, title=title)
    return [each.ids for each in said]


def _length(text: Text) -> int:
    """By which texts are sorted, so that batches are not mostly padding."""
    return len(text.tokens.input_ids)


def _key(example: Example) -> str:
    """Of a prompt, whatever is said to it: an audit may leave answers out (`forget_answers`)."""
    return sha256_of(example.prompt)
