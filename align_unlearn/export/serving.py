"""How to serve what was written: text for the servers that people use."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from align_unlearn.data.examples import Messages
from align_unlearn.export.packed import GGUF

ROLES = ("system", "user", "assistant")
FOUR_TURNS = ("system", "user", "assistant", "user")


@dataclass(frozen=True)
class Turns:
    """A chat template as what stands before each message.

    Attributes:
        first: by role, before the first message of a chat.
        later: by role, before any other.
        end: before the answer that is asked for.
    """

    first: dict[str, str]
    later: dict[str, str]
    end: str

    def render(self, messages: Messages) -> str:
        """The chat as text."""
        before = [(self.later if at else self.first)[each["role"]] for at, each in enumerate(messages)]
        return "".join(start + each["content"] for start, each in zip(before, messages, strict=True)) + self.end


def turns_of(tokenizer: Any) -> Turns | None:
    """The tokenizer's chat template as what it writes before each message.

    None where it is not of that kind (it has no system turn, or folds one into another), or is none at all.
    """
    if not tokenizer.chat_template:
        return None
    try:
        before, end = _between(tokenizer, FOUR_TURNS)
        alone, _ = _between(tokenizer, ("user",))
        found = Turns(
            {"system": before[0], "user": alone[0], "assistant": before[2]},
            {"system": before[1], "user": before[1], "assistant": before[2]},
            end,
        )
        for roles in (("user", "assistant", "user"), ("system", "user"), (*FOUR_TURNS, "assistant", "user")):
            said = _chat(roles)
            if found.render(said) != tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True):
                return None
    except (TemplateError, ValueError):  # the template refuses such a chat, or changes the words
        return None
    return found


def _chat(roles: tuple[str, ...]) -> Messages:
    return [{"role": role, "content": f"zqx{at}"} for at, role in enumerate(roles)]


def _between(tokenizer: Any, roles: tuple[str, ...]) -> tuple[list[str], str]:
    """What the template writes before each message of a chat, and after the last."""
    left, before = tokenizer.apply_chat_template(_chat(roles), tokenize=False, add_generation_prompt=True), []
    for each in _chat(roles):
        start, found, left = left.partition(each["content"])
        if not found:
            raise ValueError(each["role"])
        before.append(start)
    return before, left


def modelfile(file: str, tokenizer: Any) -> str:
    """Ollama's Modelfile: the GGUF file beside it, where an answer ends, and the chat template in Ollama's words.

    A template that cannot be said so is left to Ollama, which knows the common ones by the GGUF file's own.
    """
    lines = [f"FROM ./{file}"]
    if tokenizer.eos_token:
        lines.append(f"PARAMETER stop {json.dumps(tokenizer.eos_token)}")
    if template := ollama_template(tokenizer):
        lines.append(f'TEMPLATE """{template}"""')
    return "\n".join([*lines, ""])


def ollama_template(tokenizer: Any) -> str | None:
    """The chat template as a Go template over `.Messages`; none where it cannot be said so."""
    turns = turns_of(tokenizer)
    if turns is None:
        return None
    texts = [*turns.first.values(), *turns.later.values(), turns.end]
    if any(mark in text for text in texts for mark in ("{{", '"""')):
        return None
    bos = tokenizer.bos_token or ""
    doubled = bool(bos) and tokenizer("a").input_ids[0] == tokenizer.bos_token_id  # the server puts one there itself
    first = {role: text.removeprefix(bos) if doubled else text for role, text in turns.first.items()}
    cases = "".join(
        f'{{{{ {"if" if at == 0 else "else if"} eq $m.Role "{role}" }}}}'
        f"{{{{ if eq $i 0 }}}}{first[role]}{{{{ else }}}}{turns.later[role]}{{{{ end }}}}"
        for at, role in enumerate(ROLES)
    )
    return f"{{{{ range $i, $m := .Messages }}}}{cases}{{{{ end }}}}{{{{ $m.Content }}}}{{{{ end }}}}{turns.end}"


def vllm_command(folder: str, precision: str) -> str:
    """The command line with which vLLM serves the folder."""
    extra = " --quantization bitsandbytes --load-format bitsandbytes" if precision in ("nf4", "fp4", "int8") else ""
    return f"vllm serve {folder}{extra}"


def how_to_serve(precision: str) -> list[str]:
    """A model card's lines on serving the folder that it is in.

    Args:
        precision: of `FORMATS`, or `adapter`.
    """
    if precision == "adapter":
        return ["Load it with PEFT on the base named above, held in the precision named above: on another it is a "
                "model that nobody has audited."]  # fmt: skip
    if precision in GGUF:
        return [
            "`ollama create unlearned -f Modelfile`, then `ollama run unlearned`; or `llama-server -m` the GGUF file."
        ]
    return [f"`{vllm_command('.', precision)}` in this folder, or `AutoModelForCausalLM.from_pretrained`."]
