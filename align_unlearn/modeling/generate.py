"""Answers in batches: prompts sorted by length, padded on the left, greedy or sampled, with progress."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from align_unlearn.modeling.roles import evaluating

PLAIN = {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0,
         "remove_invalid_values": True}  # fmt: skip
"""Decoding as the probabilities are: what a generation config adds hides what a model would say. A broken model's
logits that are no numbers are passed over, so that it can be asked at all."""


@dataclass(frozen=True)
class Generated:
    """One answer: its tokens without the EOS, its text, and whether it ended by itself."""

    ids: list[int]
    text: str
    finished: bool


def progress_bar() -> Progress:
    """The progress bar of every long step here: what, how far, how long it took and will take."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 32,
    title: str = "generating",
) -> list[Generated]:
    """One answer for each tokenised prompt, in the order given.

    The same seed gives the same answers; the caller's random state is left as it was.

    Args:
        model: a causal LM; the adapters that are on take part.
        prompts: token ids of each prompt, special tokens included.
        temperature: 0 is greedy.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: dict[int, Generated] = {}
    devices = [model.device] if model.device.type == "cuda" else []
    with evaluating(model), torch.random.fork_rng(devices), progress_bar() as progress:
        torch.manual_seed(seed)
        bar = progress.add_task(title, total=len(prompts))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            said = _answers(model, tokenizer, [prompts[i] for i in rows], max_new_tokens, temperature, 1)
            answers |= {i: own[0] for i, own in zip(rows, said, strict=True)}
            progress.advance(bar, len(rows))
    return [answers[i] for i in range(len(prompts))]


@torch.no_grad()
def generate_batch(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    samples: int = 1,
    seed: int = 0,
) -> list[list[Generated]]:
    """`samples` answers to each prompt of one batch; each prompt is read once, however many answers are drawn.

    Args:
        model: as for `generate`.
        tokenizer: its tokenizer.
        prompts: token ids; best of like length.
        temperature: 0 is greedy.
    """
    devices = [model.device] if model.device.type == "cuda" else []
    with evaluating(model), torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        return _answers(model, tokenizer, prompts, max_new_tokens, temperature, samples)


def _answers(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], max_new_tokens: int, temperature: float, samples: int
) -> list[list[Generated]]:
    settings: dict[str, Any] = {"do_sample": temperature > 0, **PLAIN}
    if temperature > 0:
        settings |= {"temperature": temperature, "top_p": 1.0, "top_k": 0}
    stop = end_of_turn_ids(model, tokenizer)
    ids, mask = (each.to(model.device) for each in _left_padded(prompts, tokenizer.pad_token_id))
    if samples > 1:
        if ids.shape[1] > 1:
            settings["past_key_values"] = _read_prompts(model, ids, mask, samples)
        ids, mask = ids.repeat_interleave(samples, 0), mask.repeat_interleave(samples, 0)
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=sorted(stop),
        **settings,
    )
    cut = [_cut(tokens, stop, tokenizer) for tokens in output[:, ids.shape[1] :].tolist()]
    return [cut[start : start + samples] for start in range(0, len(cut), samples)]


def _read_prompts(model: Any, ids: torch.Tensor, mask: torch.Tensor, samples: int) -> Any:
    """The cache of all but the prompts' last tokens, repeated for every sample; `generate` reads on from there."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    read = model(
        input_ids=ids[:, :-1],
        attention_mask=mask[:, :-1],
        position_ids=positions[:, :-1],
        use_cache=True,
        logits_to_keep=1,
    )
    read.past_key_values.batch_repeat_interleave(samples)
    return read.past_key_values


def end_of_turn_ids(model: Any, tokenizer: Any) -> set[int]:
    """Every token id that ends an answer: the tokenizer's EOS and those of the generation config."""
    more = model.generation_config.eos_token_id
    listed = more if isinstance(more, list) else [more] if more is not None else []
    return {int(tokenizer.eos_token_id), *map(int, listed)}


def _left_padded(rows: Sequence[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def _cut(tokens: list[int], stop: set[int], tokenizer: Any) -> Generated:
    end = next((at for at, token in enumerate(tokens) if token in stop), None)
    ids = tokens[:end]
    return Generated(ids, tokenizer.decode(ids, skip_special_tokens=True).strip(), end is not None)
