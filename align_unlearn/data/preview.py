"""`align-unlearn data preview`: a row's tokens with the trained ones marked."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from align_unlearn.data.tokens import Tokens


def marked(tokenizer: Any, tokens: Tokens) -> Text:
    """Prompt tokens dim, trained tokens on green, one token after the other with a bar between."""
    text = Text()
    for ids, style in ((tokens.prompt_ids, "dim"), (tokens.completion_ids, "black on green")):
        for token in ids:
            text.append(tokenizer.decode([token]).replace("\n", "⏎"), style=style)
            text.append("|", style="dim")
    return text


def bracketed(tokenizer: Any, tokens: Tokens) -> str:
    """The same without colour: trained tokens in «…»."""
    prompt = "".join(f"{tokenizer.decode([token])}|" for token in tokens.prompt_ids)
    completion = "".join(f"«{tokenizer.decode([token])}»" for token in tokens.completion_ids)
    return (prompt + completion).replace("\n", "⏎")
