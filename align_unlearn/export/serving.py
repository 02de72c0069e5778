"""How to serve what was written: text files for the servers that people use."""

from __future__ import annotations

import json
from typing import Any

MESSAGES = [{"role": "user", "content": "\u0001"}]


def modelfile(file: str, tokenizer: Any) -> str:
    """Ollama's Modelfile: the GGUF file beside it, and where an answer ends.

    The chat template is in the GGUF file; Ollama reads templates of its own kind from there where it knows them.
    """
    lines = [f"FROM ./{file}", "PARAMETER temperature 0.7"]
    if tokenizer.eos_token:
        lines.append(f"PARAMETER stop {json.dumps(tokenizer.eos_token)}")
    if tokenizer.chat_template:
        lines.append(f'TEMPLATE """{turn_template(tokenizer)}"""')
    return "\n".join([*lines, ""])


def turn_template(tokenizer: Any) -> str:
    """One turn as the tokenizer's own template renders it, in Ollama's words."""
    rendered = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    before, _, after = rendered.partition(MESSAGES[0]["content"])
    return f"{before}{{{{ .Prompt }}}}{after}".replace('"""', '\\"\\"\\"')


def vllm_command(folder: str, precision: str) -> str:
    """The command line with which vLLM serves the folder."""
    extra = " --quantization bitsandbytes --load-format bitsandbytes" if precision in ("nf4", "fp4", "int8") else ""
    return f"vllm serve {folder}{extra}"
