"""`align-unlearn data preview`: a row's tokens with the trained ones marked."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from align_unlearn.data.examples import read_examples
from align_unlearn.data.tokens import Tokens, prompt_ids, tokenise
from align_unlearn.modeling.tokenizer import load_tokenizer


def marked(tokenizer: Any, tokens: Tokens) -> Text:
    """Prompt tokens dim, trained tokens on green, one token after the other with a bar between."""
    text = Text()
    for ids, style in ((tokens.prompt_ids, "dim"), (tokens.completion_ids, "black on green")):
        for token in ids:
            said = tokenizer.decode([token]).replace("\n", "⏎")
            text.append("".join(c if c.isprintable() else "�" for c in said), style=style)
            text.append("|", style="dim")
    return text


def preview_job(job: Any, model_name: str, *, rows: int = 1) -> list[Text]:
    """The first rows of a job's data sets, marked, with their place and number of tokens.

    Args:
        job: whose data sets.
        model_name: whose tokenizer.
        rows: how many of each set.
    """
    tokenizer = load_tokenizer(model_name)
    lines: list[Text] = []
    for name in ("forget_dataset", "neighbour_dataset", "retain_dataset"):
        if source := getattr(job, name):
            examples = read_examples(
                source, tokenizer, prefix_tokens=job.prefix_tokens, continuation_tokens=job.continuation_tokens
            )
            lines.append(Text(f"\n{name}: {source}, {len(examples)} rows", style="bold"))
            for example in examples[:rows]:
                if example.completion is None:
                    tokens = Tokens(prompt_ids(tokenizer, example), [])
                    sizes = f"{len(tokens.prompt_ids)} tokens, then the original's own answer, sampled at run time"
                else:
                    tokens = tokenise(tokenizer, example, max_length=None)
                    sizes = f"{len(tokens.prompt_ids)} + {len(tokens.completion_ids)} tokens"
                lines += [Text(f"{example.where}, {sizes}", style="dim"), marked(tokenizer, tokens)]
    return lines
