"""What a model may be written as, in one table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from align_unlearn.config import BaseModelConfig
from align_unlearn.errors import UserError
from align_unlearn.export.converted import convert, write_again
from align_unlearn.export.four_bit_folder import write_four_bit
from align_unlearn.export.gguf_file import write_gguf
from align_unlearn.export.passed_on import leave_code_out, pass_on_tokenizer
from align_unlearn.export.rounded import Codes
from align_unlearn.export.serving import modelfile
from align_unlearn.export.stream import write_streamed
from align_unlearn.files import scratch_folder, write_text
from align_unlearn.modeling.adapter_file import Updates
from align_unlearn.modeling.load import DTYPES, held_as, load_base
from align_unlearn.modeling.plain import empty_plain


@dataclass(frozen=True)
class Shipment:
    """What is to be written.

    Attributes:
        config: of the base.
        tokenizer: the run's.
        mode: of `MODES`.
        model: the adapter model.
        updates: of the adapter, where base and adapter can be merged file by file.
        target: a plain fp32 model with the weights; none where they are.
        codes: of its layers, where they have been rounded.
        converter: llama.cpp's `convert_hf_to_gguf.py`, for families that are not written here.
        trust_remote_code: run code that comes with the model.
    """

    config: BaseModelConfig
    tokenizer: Any
    mode: str
    model: Any
    updates: Updates | None
    target: Any
    codes: Codes | None
    converter: str | None
    trust_remote_code: bool


@dataclass(frozen=True)
class Format:
    """A format.

    Attributes:
        write: (shipment, folder) → the folder holds the model's weights and configuration.
        blocks: it rounds in blocks, so that there are codes to be chosen.
        bits: of a weight, scales included.
        about: what it is, in words.
    """

    write: Callable[[Shipment, Path], None]
    blocks: bool
    bits: int
    about: str


def _plain(dtype: torch.dtype) -> Callable[[Shipment, Path], None]:
    def write(shipment: Shipment, folder: Path) -> None:
        if shipment.updates is not None:
            base = shipment.model.get_base_model()
            write_streamed(base, shipment.config, shipment.updates, folder, dtype, shipment.mode)
            return
        model = empty_plain(shipment.target, dtype)
        weights = {name: weight.to(dtype).contiguous() for name, weight in shipment.target.state_dict().items()}
        model.generation_config = shipment.target.generation_config
        model.save_pretrained(folder, state_dict={name: weights[name] for name in model.state_dict()})

    return write


def _four_bit(precision: str) -> Callable[[Shipment, Path], None]:
    def write(shipment: Shipment, folder: Path) -> None:
        if shipment.codes is None:
            raise UserError("Nothing was rounded.", where="--precision")
        write_four_bit(
            shipment.target, shipment.config, shipment.codes, folder, precision,
            trust_remote_code=shipment.trust_remote_code,
        )  # fmt: skip

    return write


def _int8(shipment: Shipment, folder: Path) -> None:
    """LLM.int8 rounds each row by itself; the library does it as it loads."""
    with scratch_folder(folder) as whole:
        DTYPE_WRITERS["float32"](replace(shipment, updates=None), whole)
        held = held_as(
            shipment.config, model_name_or_path=str(whole), after=None, load_in_4bit=False, load_in_8bit=True
        )
        load_base(held, trust_remote_code=shipment.trust_remote_code).save_pretrained(folder)


def _gguf(precision: str) -> Callable[[Shipment, Path], None]:
    def write(shipment: Shipment, folder: Path) -> None:
        file = folder / f"model-{precision}.gguf"
        if shipment.converter is not None:
            _through_converter(shipment, file, precision)
        else:
            write_gguf(shipment.target, shipment.tokenizer, file, precision, shipment.codes)
        write_text(folder / "Modelfile", modelfile(file.name, shipment.tokenizer))

    return write


def _through_converter(shipment: Shipment, file: Path, precision: str) -> None:
    """llama.cpp's own converter on an unquantised folder; then our codes in its file."""
    with scratch_folder(file.parent) as beside:
        whole, converted = beside / "model", beside / "f16.gguf"
        DTYPE_WRITERS["float32"](replace(shipment, updates=None), whole)  # norms stay as they are
        pass_on_tokenizer(shipment.config, shipment.tokenizer, whole)  # a converter may read files that we do not
        if not shipment.trust_remote_code:
            leave_code_out(whole)
        convert(str(shipment.converter), whole, converted)
        write_again(converted, file, precision, shipment.tokenizer, shipment.target, shipment.codes or {})


DTYPE_WRITERS = {name: _plain(dtype) for name, dtype in DTYPES.items()}
FORMATS: dict[str, Format] = {
    **{name: Format(write, False, 8 * DTYPES[name].itemsize, f"safetensors in {name}")
       for name, write in DTYPE_WRITERS.items()},
    "nf4": Format(_four_bit("nf4"), True, 5, "bitsandbytes NF4, pre-quantised"),
    "fp4": Format(_four_bit("fp4"), True, 5, "bitsandbytes FP4, pre-quantised"),
    "int8": Format(_int8, False, 9, "bitsandbytes LLM.int8, pre-quantised"),
    "f16": Format(_gguf("f16"), False, 16, "GGUF F16"),
    "q8_0": Format(_gguf("q8_0"), True, 9, "GGUF Q8_0"),
    "q5_1": Format(_gguf("q5_1"), True, 6, "GGUF Q5_1"),
    "q4_0": Format(_gguf("q4_0"), True, 5, "GGUF Q4_0"),
}  # fmt: skip
"""By `--precision`."""
