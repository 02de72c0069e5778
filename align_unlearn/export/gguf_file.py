"""A plain model as one GGUF file, for llama.cpp and what is built on it.

Written with the `gguf` library for families whose written file transformers' own GGUF loader reads back (llama, qwen2,
qwen3, with byte-level BPE tokenizers); others go through llama.cpp's converter (`converted.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from align_unlearn.errors import UserError
from align_unlearn.export.packed import GGUF_BYTES
from align_unlearn.modeling.grid import Grid
from align_unlearn.modeling.positions import FACTORS, STRETCHED, position_factors

FAMILIES = {"llama": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
"""Model types of transformers, and what GGUF calls them."""
EMBEDDINGS = "q8_0"
"""Of embeddings and LM head beside quantised layers, where they have no codes of their own."""
SPLITS = {
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?",
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?",
}
"""How a tokenizer's splitting begins, by the name that llama.cpp has for it."""

Rounded = Mapping[str, tuple[Grid, Tensor]]


def write_gguf(model: Any, tokenizer: Any, path: Path, precision: str, rounded: Rounded | None = None) -> None:
    """Writes the file.

    Args:
        model: a plain causal LM.
        tokenizer: its tokenizer.
        path: of the file.
        precision: `f16`, or a GGUF precision of `GRIDS`.
        rounded: (grid, codes) by layer and embedding, where the rounding has been done; else every weight is rounded by
            itself.

    Raises:
        UserError: the family or the tokenizer is not one that can be checked here.
    """
    import gguf

    family = check_family(model, tokenizer)
    config = model.config.get_text_config()
    writer = gguf.GGUFWriter(str(path), family)
    _write_shape(writer, config, family)
    _write_tokenizer(writer, tokenizer, config.vocab_size)
    kinds = gguf.GGMLQuantizationType
    writer.add_file_type(file_type(precision))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, FAMILIES[config.model_type]), config.num_hidden_layers)
    for name, weight in _tensors(model):
        written = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if written is None:
            raise UserError(f"GGUF has no name for the weight {name}.", where=family)
        order = _row_order(name, weight, config, family)
        layer = name.removesuffix(".weight")
        if rounded is not None and layer in rounded:
            grid, codes = rounded[layer]
            packed = GGUF_BYTES[grid.kind](codes, grid)[order]
            writer.add_tensor(written, packed, raw_dtype=getattr(kinds, grid.kind.upper()))
            continue
        data = weight.detach().float().cpu().numpy()[order]
        own = _precision_of(name, data, precision)
        if own in ("f32", "f16"):
            writer.add_tensor(written, data.astype(np.float32 if own == "f32" else np.float16))
        else:
            kind = getattr(kinds, own.upper())
            writer.add_tensor(written, gguf.quants.quantize(data, kind), raw_dtype=kind)
    if (factors := position_factors(config)) is not None:
        writer.add_tensor(FACTORS, factors.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check_family(model: Any, tokenizer: Any) -> str:
    """GGUF's name of the model's family.

    Raises:
        UserError: what would be written could not be checked here.
    """
    kind = model.config.get_text_config().model_type
    fix = "--converter, llama.cpp's convert_hf_to_gguf.py"
    if kind not in FAMILIES:
        raise UserError(f"Models of type {kind} are not written as GGUF here.", where="--precision", fix=fix)
    if _vocabulary(tokenizer)["model"]["type"] != "BPE" or not _is_byte_level(tokenizer):
        raise UserError("Only byte-level BPE tokenizers are written as GGUF here.", where="--precision", fix=fix)
    split_name(tokenizer)
    rope = dict(getattr(model.config.get_text_config(), "rope_parameters", None) or {})
    if rope.get("rope_type", "default") not in ("default", *(STRETCHED if kind == "llama" else ())):
        raise UserError(f"Positions of kind {rope['rope_type']} are not written as GGUF here.", where="--precision",
                        fix=fix)  # fmt: skip
    return str(kind)


def split_name(tokenizer: Any) -> str:
    """llama.cpp's name for how the tokenizer cuts text before BPE.

    Raises:
        UserError: it is none that is known here.
    """
    stages = _vocabulary(tokenizer).get("pre_tokenizer") or {}
    parts = stages.get("pretokenizers", [stages])
    kinds = [part.get("type") for part in parts]
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
        return "smollm"
    for part in parts:
        pattern = (part.get("pattern") or {}).get("Regex", "") if part.get("type") == "Split" else ""
        for name, begins in SPLITS.items():
            if pattern.startswith(begins):
                return name
    if [part.get("type") for part in parts] == ["ByteLevel"] and parts[0].get("use_regex", True):
        return "gpt-2"
    raise UserError("It is not known how llama.cpp calls this tokenizer's way of splitting.", where="--precision",
                    fix="--converter, llama.cpp's convert_hf_to_gguf.py")  # fmt: skip


def _vocabulary(tokenizer: Any) -> dict[str, Any]:
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise UserError("Only tokenizers of the tokenizers library are written as GGUF here.", where="--precision")
    found: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return found


def _is_byte_level(tokenizer: Any) -> bool:
    stages = _vocabulary(tokenizer).get("pre_tokenizer") or {}
    return any(part.get("type") == "ByteLevel" for part in stages.get("pretokenizers", [stages]))


def _write_shape(writer: Any, config: Any, family: str) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_vocab_size(config.vocab_size)
    rope = dict(getattr(config, "rope_parameters", None) or {})
    writer.add_rope_freq_base(float(rope.get("rope_theta", getattr(config, "rope_theta", 10000.0))))


def _write_tokenizer(writer: Any, tokenizer: Any, size: int) -> None:
    import gguf

    known = _vocabulary(tokenizer)
    by_number = {number: token for token, number in tokenizer.get_vocab().items()}
    added = {int(each["id"]): bool(each["special"]) for each in known["added_tokens"]}
    types = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split_name(tokenizer))
    writer.add_token_list([by_number.get(number, f"[PAD{number}]") for number in range(size)])
    writer.add_token_types([
        types.UNUSED if number not in by_number
        else types.NORMAL if number not in added
        else types.CONTROL if added[number] else types.USER_DEFINED
        for number in range(size)
    ])  # fmt: skip
    merges = known["model"]["merges"]
    writer.add_token_merges([each if isinstance(each, str) else " ".join(each) for each in merges])
    for name in ("bos", "eos", "unk", "pad"):
        if (number := getattr(tokenizer, f"{name}_token_id", None)) is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    # templates render the beginning of a text themselves; tokenizers that add one do so without any
    writer.add_add_bos_token(tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id])
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _tensors(model: Any) -> list[tuple[str, Tensor]]:
    tied = model.config.get_text_config().tie_word_embeddings
    return [(name, weight) for name, weight in model.state_dict().items() if not (tied and name == "lm_head.weight")]


def _row_order(name: str, weight: Tensor, config: Any, family: str) -> NDArray[np.int64]:
    """llama's heads hold the two halves of a rotation side by side."""
    rows = np.arange(weight.shape[0])
    if family != "llama" or not name.rpartition(".")[0].endswith(("q_proj", "k_proj")):
        return rows
    heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
    return rows.reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def _precision_of(name: str, data: NDArray[np.float32], precision: str) -> str:
    """Norms and biases stay whole; widths that blocks of 32 do not divide stay in 16 bits."""
    if data.ndim == 1:
        return "f32"
    if precision == "f16" or data.shape[-1] % 32:
        return "f16"
    return EMBEDDINGS if "embed_tokens" in name or "lm_head" in name else precision


def as_embedding(weight: Tensor) -> Tensor:
    """What is read of a (vocabulary, width) weight that stands beside rounded ones in a file."""
    import gguf

    if weight.shape[-1] % 32:
        return weight.half().float()
    kind = getattr(gguf.GGMLQuantizationType, EMBEDDINGS.upper())
    data = weight.detach().float().cpu().numpy()
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(data, kind), kind)).to(weight.device)


def file_type(precision: str) -> int:
    """What llama.cpp calls a file of this precision."""
    import gguf

    names = {"f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0", "q5_1": "MOSTLY_Q5_1", "q4_0": "MOSTLY_Q4_0"}
    return int(getattr(gguf.LlamaFileType, names[precision]))
