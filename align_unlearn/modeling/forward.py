"""The backbone's final hidden states: what every objective and every metric here is computed from."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def hidden_states(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Final hidden states (B, T, H) of a causal LM, after its last norm, before its LM head.

    Args:
        model: a causal LM, with or without adapters; the adapters that are on take part.
        input_ids: (B, T).
        attention_mask: (B, T), 1 on text and 0 on padding.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    outputs = base.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    states: Tensor = outputs.last_hidden_state
    return states
