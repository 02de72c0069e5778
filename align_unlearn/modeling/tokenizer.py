"""The tokenizer, checked and repaired in one place: EOS, pad, chat template.

What the rest relies on after `load_tokenizer`:

- `eos_token` is the token that ends an assistant's turn (for chat models that differ, such as those whose tokenizer
  names the end of a document), so that "the completion and its EOS" means the same everywhere;
- `pad_token` is set, and never used to find out where text ends: masks come from positions;
- padding is on the right for training; generation pads on the left by itself.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from align_unlearn.errors import UserError
from align_unlearn.modeling.embedded import resolve_model_name

Messages = list[dict[str, str]]
PROBE = "zqx"
"""Content that a template is shown to see what it writes around it."""


def load_tokenizer(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of model `name`, repaired as the module says.

    Raises:
        UserError: there is no tokenizer there, or it has no EOS token that could be found.
    """
    path = resolve_model_name(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"No tokenizer could be loaded: {str(error).splitlines()[0]}", where=name) from error
    return repair(tokenizer, name)


def repair(tokenizer: Any, name: str = "tokenizer") -> Any:
    """Sets EOS to the end-of-turn token and pad to something; returns the same tokenizer."""
    end_of_turn = _end_of_turn(tokenizer)
    if end_of_turn is not None:
        tokenizer.eos_token = end_of_turn
    if tokenizer.eos_token is None:
        raise UserError(
            "The tokenizer has no EOS token and no chat template to find one from.",
            where=name,
            fix="set eos_token in its tokenizer_config.json",
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, where: str | None = None) -> str:
    """`messages` as the text after which the assistant speaks.

    Raises:
        UserError: the tokenizer has no chat template, or its template refuses these messages.
    """
    if not tokenizer.chat_template:
        raise UserError(
            "This model has no chat template, but the rows are chat (messages, or question and answer).",
            where=where,
            fix="give rows with plain-text prompt and completion, or put a chat_template.jinja into its folder",
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # the template is the model's own program and may raise anything
        raise UserError(f"The chat template refuses this conversation: {error}", where=where) from error


def render_completion(tokenizer: PreTrainedTokenizerBase, messages: Messages, completion: str) -> str:
    """The assistant's turn as the template writes it after `render_prompt(messages)`: content, end of turn, and on."""
    prompt = render_prompt(tokenizer, messages)
    answer = [*messages, {"role": "assistant", "content": completion}]
    whole = str(tokenizer.apply_chat_template(answer, tokenize=False))
    if whole.startswith(prompt):
        return whole[len(prompt) :]
    # Some templates open the assistant's turn differently when they prompt for it (a thinking block, say). The model
    # is asked with `prompt`, so the completion is what it should say after exactly that.
    return completion + str(tokenizer.eos_token)


def _end_of_turn(tokenizer: Any) -> str | None:
    """The special token that the chat template puts right after an assistant's content."""
    if not tokenizer.chat_template:
        return None
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:  # as above
        return None
    tail = text.rpartition(PROBE)[2].lstrip()
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    starts = [token for token in special | set(tokenizer.all_special_tokens) if tail.startswith(token)]
    return str(max(starts, key=len)) if starts else None
