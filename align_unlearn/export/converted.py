"""GGUF of families that are not written here: llama.cpp's converter writes the file, our codes take its weights' place.

The converter writes an unquantised folder in 16 bits, with the names, the order of rows, the tokenizer and the settings
that llama.cpp wants. Which weight a tensor of the file is, and which row each of its rows is, is found by comparing
their values, so that nothing has to be known of the family; what it does not hold unchanged is refused.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from align_unlearn.errors import UserError
from align_unlearn.export.gguf_file import EMBEDDINGS, file_type
from align_unlearn.export.packed import GGUF_BYTES
from align_unlearn.export.rounded import Codes

OF_THE_FILE = (
    "GGUF.",
    "general.architecture",
    "general.file_type",
    "general.quantization_version",
    "general.alignment",
)
"""Fields, by their beginnings, that a file has of its own."""
ENDS = {"tokenizer.ggml.eos_token_id": "eos_token_id", "tokenizer.ggml.padding_token_id": "pad_token_id"}
"""Fields that the run's tokenizer knows better: where an answer ends, by the chat template."""
WHOLE = ("token_embd.weight", "output.weight")
"""What GGUF calls embeddings and LM head."""


def convert(converter: str, folder: Path, file: Path) -> None:
    """llama.cpp's `convert_hf_to_gguf.py` on an unquantised folder, to 16 bits.

    Raises:
        UserError: it does not run.
    """
    command = [sys.executable, converter, str(folder), "--outfile", str(file), "--outtype", "f16"]
    # it asks whether to run the tokenizer's own code; nobody is there to say yes
    ran = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if ran.returncode or not file.is_file():
        why = (ran.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"The converter failed: {why}", where=converter)


def write_again(source: Path, file: Path, precision: str, tokenizer: Any, model: Any, codes: Codes) -> None:
    """Writes a converted file again: its layers as their codes, and with the tokens at which the run's answers end.

    What the converter keeps in fp32 stays so (norms, routers); embeddings without codes beside layers
    with them are in `EMBEDDINGS`.

    Args:
        source: the file in 16 bits.
        file: the one to be written.
        precision: `f16`, or of `GGUF_BYTES`.
        tokenizer: the run's.
        model: a plain model with the weights that were converted.
        codes: of its layers, and of embeddings; none for `f16`.

    Raises:
        UserError: the file cannot be read, or does not hold a layer's weight as it is.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(source)
        fields = {name: _content_of(field) for name, field in reader.fields.items() if not name.startswith(OF_THE_FILE)}
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"The converter's file cannot be read: {error}", where=str(source.name)) from error
    kinds = gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(str(file), reader.fields["general.architecture"].contents())
    for name, (value, kind, inner) in fields.items():
        own = getattr(tokenizer, ENDS[name], None) if name in ENDS else None
        if not (kind == gguf.GGUFValueType.ARRAY and not len(value)):
            writer.add_key_value(name, value if own is None else own, kind, sub_type=inner)
    for name in sorted(ENDS.keys() - fields.keys()):
        writer.add_uint32(name, getattr(tokenizer, ENDS[name]))
    writer.add_file_type(file_type(precision))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    found = layers_of(reader.tensors, model, codes)
    for tensor in reader.tensors:
        plain = tensor.tensor_type in (kinds.F16, kinds.F32)
        if tensor.name in found and tensor.tensor_type == kinds.F16:
            layer, order = found[tensor.name]
            grid, chosen = codes[layer]
            packed = GGUF_BYTES[grid.kind](chosen, grid)[order]
            writer.add_tensor(tensor.name, packed, raw_dtype=getattr(kinds, grid.kind.upper()))
        elif codes and plain and tensor.name in WHOLE and tensor.data.shape[-1] % 32 == 0:
            kind = getattr(kinds, EMBEDDINGS.upper())
            whole = np.asarray(tensor.data, dtype=np.float32)
            writer.add_tensor(tensor.name, gguf.quants.quantize(whole, kind), raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, np.asarray(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def layers_of(tensors: Sequence[Any], model: Any, codes: Codes) -> dict[str, tuple[str, NDArray[np.int64]]]:
    """By tensor of the file, the layer that it is and where in the layer each of its rows stands.

    Raises:
        UserError: a layer is not among them.
    """
    by_content: dict[bytes, list[str]] = defaultdict(list)
    rows: dict[str, list[bytes]] = {}
    for name in codes:
        rows[name] = _digests(model.get_submodule(name).weight.detach().half().cpu().numpy())
        by_content[_content(rows[name])].append(name)
    found = {}
    for tensor in tensors:
        if tensor.data.ndim != 2 or tensor.data.dtype not in (np.float16, np.float32):
            continue
        written = _digests(np.asarray(tensor.data, dtype=np.float16))
        if same := by_content.get(_content(written)):
            # layers may be copies of each other; their codes are not
            layer = next((name for name in same if _block(name) == _block(tensor.name)), same[0])
            same.remove(layer)
            places: dict[bytes, list[int]] = defaultdict(list)
            for at, digest in enumerate(rows[layer]):
                places[digest].append(at)
            found[tensor.name] = layer, np.array([places[digest].pop(0) for digest in written])
    if missing := set(codes) - {layer for layer, _ in found.values()}:
        raise UserError(f"The converter's file does not hold the weight of {sorted(missing)[0]} as it is.",
                        where="--converter", fix="--precision f16, which is not rounded")  # fmt: skip
    return found


def _content_of(field: Any) -> tuple[Any, Any, Any]:
    """Value, type, and type of the items of a list."""
    return field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None


def _block(name: str) -> str | None:
    """The number of the layer that a weight belongs to, in transformers' names and in GGUF's."""
    found = re.search(r"(?:^|\.)(\d+)\.", name)
    return found and found.group(1)


def _digests(weight: NDArray[np.float16]) -> list[bytes]:
    return [blake2b(row.tobytes(), digest_size=16).digest() for row in np.ascontiguousarray(weight)]


def _content(digests: list[bytes]) -> bytes:
    """Of a weight, whatever the order of its rows."""
    return blake2b(b"".join(sorted(digests)), digest_size=16).digest()
