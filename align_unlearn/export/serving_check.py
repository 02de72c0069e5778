"""The exported folder in a process of its own, with transformers alone: what anyone who downloads it has.

PEFT, TRL and this package cannot be imported there. It must render the run's prompts to the same bytes, and its answers
must be those that the folder gave here, or at least be judged alike: what is served is what must have forgotten.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from align_unlearn.audit.answers import verdict_on
from align_unlearn.audit.subjects import Subject
from align_unlearn.data.examples import Example
from align_unlearn.data.tokens import prompt_ids
from align_unlearn.errors import Refused
from align_unlearn.modeling.generate import Generated, generate
from align_unlearn.modeling.tokenizer import render_prompt

PROMPTS, NEW_TOKENS = 20, 16
SAME, SAME_QUANTISED = 0.9, 0.5
"""Share of answers that must be the same to the token; other threads round a few apart.

bitsandbytes serves 4 and 8 bits with other kernels than it trains with, so that more of them part somewhere.
"""
SAME_VERDICTS = 0.9
"""Share of answers that must be judged alike, whatever the kernels."""

SCRIPT = """
import json, sys
for name in ("peft", "trl", "align_unlearn"):
    sys.modules[name] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
given = json.load(sys.stdin)
where = {"gguf_file": given["gguf"]} if given["gguf"] else {}
dtype = getattr(torch, given["dtype"])
trust = given["trust_remote_code"]
tokenizer = AutoTokenizer.from_pretrained(given["folder"], trust_remote_code=trust, **where)
model = AutoModelForCausalLM.from_pretrained(given["folder"], dtype=dtype, trust_remote_code=trust, **where).eval()
if given["gguf"]:
    import gguf  # positions as llama.cpp has them, which transformers does not read (modeling/positions.py)
    for tensor in gguf.GGUFReader(f"{given['folder']}/{given['gguf']}").tensors:
        for module in model.modules() if tensor.name == "rope_freqs.weight" else ():
            if hasattr(module, "inv_freq"):
                module.inv_freq.div_(torch.tensor(tensor.data))
if given["device"] and not hasattr(model, "hf_quantizer"):
    model = model.to(given["device"])
said = []
for prompt in given["prompts"]:
    if isinstance(prompt, str):
        text, ids = prompt, tokenizer(prompt).input_ids
    else:
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False).input_ids
    batch = torch.tensor([ids], device=model.device)
    out = model.generate(batch, attention_mask=torch.ones_like(batch), max_new_tokens=given["new_tokens"],
                         do_sample=False, repetition_penalty=1.0, pad_token_id=tokenizer.pad_token_id)
    answer = out[0, len(ids):]
    said.append({"text": text, "prompt": ids, "answer": answer.tolist(),
                 "said": tokenizer.decode(answer, skip_special_tokens=True).strip()})
print("\\n" + json.dumps(said))
"""


@dataclass(frozen=True)
class Served:
    """How the folder did there.

    Attributes:
        prompts: that were asked.
        same_answers: share of greedy answers that are the same to the token as the folder's own here.
        same_verdicts: share of them that are judged as the folder's own are.
    """

    prompts: int
    same_answers: float
    same_verdicts: float

    def described(self) -> dict[str, float]:
        """As the manifest holds it."""
        return asdict(self)


def check_serving(
    folder: Path,
    export: Subject,
    run_tokenizer: Any,
    rows: Sequence[tuple[str, Example]],
    dtype: str,
    *,
    trust_remote_code: bool,
) -> Served:
    """Asks the folder in a process without PEFT, TRL and this package.

    Args:
        folder: that was written.
        export: the same folder, loaded here.
        run_tokenizer: of the run, whose prompts must be rendered to the same text and tokens.
        rows: what is asked, `PROMPTS` of them at most, each with the group that it is of.
        dtype: in which it is served.
        trust_remote_code: run code that comes with the model.

    Raises:
        Refused: it does not load there, renders another prompt, or gives other answers, or such as are judged
            otherwise.
    """
    asked = list(rows)[:PROMPTS]
    given = {
        "folder": str(folder.resolve()),
        "gguf": next((file.name for file in sorted(folder.glob("*.gguf"))), None),
        "dtype": "float32" if list(folder.glob("*.gguf")) else dtype,
        "device": "cuda" if export.model.device.type == "cuda" and not list(folder.glob("*.gguf")) else None,
        "trust_remote_code": trust_remote_code,
        "prompts": [each.prompt for _, each in asked],
        "new_tokens": NEW_TOKENS,
    }
    ran = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT],  # -P: nothing of the current folder is imported
        input=json.dumps(given),
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode:
        why = (ran.stderr.strip().splitlines() or ["no message"])[-1]
        raise Refused(f"The written folder does not serve with transformers alone: {why}", where=str(folder))
    found = json.loads(ran.stdout.strip().splitlines()[-1])
    prompts = [prompt_ids(run_tokenizer, each) for _, each in asked]
    for (_, example), expected, each in zip(asked, prompts, found, strict=True):
        asked_as = example.prompt
        text = asked_as if isinstance(asked_as, str) else render_prompt(run_tokenizer, asked_as)
        if each["text"] != text or each["prompt"] != expected:
            raise Refused("Served, the prompt is rendered otherwise than in training.", where=example.where)
    with export.speaking() as model:
        here = generate(  # one by one, as there: padded, one bf16 answer in five parts from itself
            model, export.tokenizer, prompts, max_new_tokens=NEW_TOKENS, batch_size=1, title="as it will be served"
        )
    same = [_same(each["answer"], own) for each, own in zip(found, here, strict=True)]
    judged = [verdict_on(group, row, each["said"]) == verdict_on(group, row, own.text)
              for (group, row), each, own in zip(asked, found, here, strict=True)]  # fmt: skip
    served = Served(len(asked), sum(same) / len(same), sum(judged) / len(judged))
    least = SAME_QUANTISED if export.precision in ("nf4", "fp4", "int8") else SAME
    if served.same_answers < least or served.same_verdicts < SAME_VERDICTS:
        raise Refused(
            f"Served with transformers alone, only {served.same_answers:.0%} of the answers are the same, and "
            f"{served.same_verdicts:.0%} are judged alike (asked for: {least:.0%} and {SAME_VERDICTS:.0%}).",
            where=str(folder),
        )
    return served


def _same(answer: list[int], own: Generated) -> bool:
    """Whether the tokens are the same, and the answer ends where ours does."""
    return answer[: len(own.ids)] == own.ids and not (own.finished and len(answer) > len(own.ids) + 1)
