"""Loading the base once, in the precision asked for, with repairs that keep its gradients true.

The settings are TRL's `ModelConfig` (our subclass `BaseModelConfig` changes defaults only), the quantisation is TRL's
`get_quantization_config`.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from trl import get_peft_config, get_quantization_config

from align_unlearn.config import BaseModelConfig
from align_unlearn.errors import UserError
from align_unlearn.files import sha256_of, sha256_of_folder
from align_unlearn.modeling.cpu import keep_freed_memory
from align_unlearn.modeling.earlier import adapter_folder, attach
from align_unlearn.modeling.embedded import resolve_model_name
from align_unlearn.modeling.positions import stretch_positions
from align_unlearn.modeling.tokenizer import repair
from align_unlearn.run_dir import is_run, read_manifest

COMMIT = re.compile("[0-9a-f]{40}")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def compute_dtype(config: BaseModelConfig) -> torch.dtype:
    """The dtype that 16-bit weights and 4-bit products are computed in: bf16 on a GPU that has it, else fp32."""
    if config.dtype in DTYPES:
        return DTYPES[config.dtype]
    return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32


def load_base(config: BaseModelConfig, *, trust_remote_code: bool = False) -> Any:
    """The base model without adapters.

    Args:
        config: which model, in which precision.
        trust_remote_code: run code that comes with the model; off unless asked for.

    Raises:
        UserError: there is no such model, it has no causal LM, its weights are incomplete, or the quantisation asked
            for cannot be had here.
    """
    if not config.model_name_or_path:
        raise UserError("No model is named.", where="model_name_or_path", fix="smollm2-135m, a hub id, or a folder")
    path = resolve_model_name(config.model_name_or_path)
    dtype = compute_dtype(config)
    settings = _with_dtype(config, dtype)
    options: dict[str, Any] = {
        "dtype": dtype,
        "revision": config.model_revision,
        "trust_remote_code": trust_remote_code,
        "attn_implementation": config.attn_implementation,
    }
    if (quantization := get_quantization_config(settings)) is not None:
        _check_quantisation()
        options["quantization_config"] = quantization
    if torch.cuda.is_available():
        options["device_map"] = {"": torch.cuda.current_device()}
    else:
        keep_freed_memory()
    model = _from_pretrained(path, config.model_name_or_path, options)
    model.config.use_cache = True
    keep_differentiable(model)
    attach(model, config.after or [])
    return model


def base_shape(config: BaseModelConfig, *, trust_remote_code: bool = False) -> Any:
    """The base without weights (on the meta device): its layers by name, its settings, and where its answers end.

    Raises:
        UserError: there is no such model.
    """
    name = str(config.model_name_or_path)
    own = load_weights_config(name, revision=config.model_revision, trust_remote_code=trust_remote_code)
    code = (getattr(own, "auto_map", None) or {}).get("AutoModelForCausalLM", "--")
    options = {} if "--" in code or not trust_remote_code else {"code_revision": config.model_revision}
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(own, trust_remote_code=trust_remote_code, **options)
    except (OSError, ValueError, ImportError) as error:
        raise _no_such_model(name, error) from error
    model.config.use_cache = True
    folder, file = base_folder(config), "generation_config.json"
    whole = {"config_file_name": "config.json", "_from_model_config": True}
    with contextlib.suppress(OSError):  # what the configuration says stays
        model.generation_config = GenerationConfig.from_pretrained(
            folder, **({} if (folder / file).is_file() else whole)
        )
    return model.eval()


def load_weights_config(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The transformers configuration of model `name`, without its weights.

    Raises:
        UserError: there is no model of that name.
    """
    try:
        return AutoConfig.from_pretrained(
            resolve_model_name(name), revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise _no_such_model(name, error) from error
    except (SafetensorError, ImportError, RuntimeError) as error:
        raise UserError(f"The model cannot be loaded: {str(error).splitlines()[0]}", where=name) from error


def pinned(config: BaseModelConfig, begun: Mapping[str, Any] | None = None) -> BaseModelConfig:
    """The configuration with the commit that a hub id stands for today, so that a later push is not taken for it.

    A folder stays as it is, and so does a name that is not found: loading says what is wrong with it.

    Args:
        config: of a base.
        begun: the manifest of a run on it that is taken up again, whose revision it keeps.
    """
    from huggingface_hub import hf_hub_download

    name = config.model_name_or_path or ""
    if not name or Path(resolve_model_name(name)).is_dir():
        return config
    known = (begun or {}).get("base", {})
    if known.get("name") == name and known.get("revision") and not COMMIT.fullmatch(config.model_revision or ""):
        return held_as(config, model_revision=known["revision"])
    try:
        file = hf_hub_download(name, "config.json", revision=config.model_revision)
    except (OSError, ValueError):
        return config
    return held_as(config, model_revision=Path(file).parent.name)  # …/snapshots/COMMIT/config.json


def lora_config(config: BaseModelConfig) -> Any:
    """PEFT's `LoraConfig` for these settings."""
    return get_peft_config(config)


def keep_differentiable(model: torch.nn.Module) -> None:
    """Stops bitsandbytes from repacking 4-bit weights for CPU inference.

    On processors with AVX512-BF16, a `Linear4bit` that runs once in evaluation mode repacks its weight for good and
    from then on computes in bf16 through a kernel with no backward: training after any sampling or evaluation would
    lose all gradient that passes through the base, with no more than a warning (bitsandbytes 0.50).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 (no attribute that torch declares)


def base_folder(config: BaseModelConfig) -> Path:
    """Where the base's files lie: the folder that is named, or its copy in the hub's cache."""
    from huggingface_hub import snapshot_download

    name = resolve_model_name(config.model_name_or_path or "")
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, revision=config.model_revision, local_files_only=True))
    except (OSError, ValueError):
        return Path(name)


def base_fingerprint(config: BaseModelConfig) -> str:
    """A hash that names the base: all of a folder (weights, configuration, tokenizer), else hub id and commit."""
    return _with_beneath(_own_fingerprint(config), config.after or [])


def _own_fingerprint(config: BaseModelConfig) -> str:
    path = Path(resolve_model_name(config.model_name_or_path or ""))
    named = sha256_of({"hub_id": str(path), "revision": config.model_revision})
    return folder_fingerprint(path) if path.is_dir() else named


def _with_beneath(own: str, after: Sequence[str]) -> str:
    beneath = [folder_fingerprint(adapter_folder(each)) for each in after]
    return sha256_of([own, *beneath]) if beneath else own


def check_after(config: BaseModelConfig) -> None:
    """Refuses earlier runs that were not trained on what lies beneath them here.

    Raises:
        UserError: one stands on other runs than those named before it, or on another base.
    """
    after = config.after or []
    own = _own_fingerprint(config) if after else ""  # the whole base is read for it, once
    for at, path in enumerate(after):
        run = adapter_folder(path).parent
        known = read_manifest(run).get("base", {}).get("sha256") if is_run(run) else None
        if known and known != _with_beneath(own, after[:at]):
            raise UserError(
                "This run was trained on something else than the base and the runs that are named before it.",
                where=f"after: {path}",
                fix="name every run that it stands on before it, oldest first, and the base that they have",
            )


def folder_fingerprint(path: Path) -> str:
    """A hash of all that makes a folder's model or adapter what it is: weights, configurations, tokenizer, code."""
    parts = [sha256_of_folder(path, pattern) for pattern in ("*.safetensors", "*.bin", "*.json", "*.jinja")]
    more = [sha256_of_folder(path, pattern) for pattern in ("*.py", "*.gguf") if any(path.glob(pattern))]
    return sha256_of([*parts, *more])


def load_gguf(path: Path) -> tuple[Any, Any]:
    """Model and tokenizer of a GGUF file as transformers reads it, in fp32.

    Raises:
        UserError: it is no GGUF file that transformers reads.
    """
    from transformers import AutoTokenizer

    source, file = str(path.parent), path.name
    try:
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
        tokenizer = repair(AutoTokenizer.from_pretrained(source, gguf_file=file), str(path))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"This is no GGUF file that can be read: {error}", where=str(path)) from error
    stretch_positions(model, path)
    return model.eval(), tokenizer


def described_base(config: BaseModelConfig) -> dict[str, Any]:
    """The base as manifests hold it."""
    return {
        "name": config.model_name_or_path,
        "revision": config.model_revision,
        "sha256": base_fingerprint(config),
        "precision": precision_name(config),
    }


def weights_fingerprint(model: Any) -> str:
    """A hash of loaded base weights (adapters and heads left out), from up to 1,024 values spread over each tensor."""
    parts = []
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    beneath = [(name, buffer) for name, buffer in base.named_buffers() if ".earlier_" in name]
    for name, parameter in [*base.named_parameters(), *beneath]:
        if "lora_" not in name:
            flat = parameter.detach().reshape(-1)
            some = flat[:: max(1, flat.numel() // 1024)].contiguous().cpu().view(torch.uint8)
            scale = getattr(getattr(parameter, "quant_state", None), "absmax", None)
            scales = None if scale is None else [str(scale.dtype), float(scale.double().sum())]
            parts.append([name.replace("base_layer.", ""), list(parameter.shape), some.numpy().tobytes().hex(), scales])
    return sha256_of(parts)


def precision_name(config: BaseModelConfig) -> str:
    """The precision in words that reports use: `nf4+float32`, `int8`, `bfloat16`, …"""
    dtype = str(compute_dtype(config)).removeprefix("torch.")
    if config.load_in_4bit:
        scales = "+nested" if config.use_bnb_nested_quant else ""
        return f"{config.bnb_4bit_quant_type}{scales}+{dtype}"
    return "int8" if config.load_in_8bit else dtype


def held_as(config: BaseModelConfig, **settings: Any) -> BaseModelConfig:
    """The configuration with other settings."""
    return replace(config, **settings)


def _with_dtype(config: BaseModelConfig, dtype: torch.dtype) -> BaseModelConfig:
    """TRL uses `dtype` as the 4-bit compute dtype; give it the resolved one, not `auto`."""
    return held_as(config, dtype=str(dtype).removeprefix("torch."))


def _check_quantisation() -> None:
    try:
        import bitsandbytes  # noqa: F401
    except Exception as error:  # a broken native library raises RuntimeError or OSError
        raise UserError(
            f"4-bit and 8-bit loading need bitsandbytes, which does not work here: {str(error).splitlines()[0]}",
            where="load_in_4bit / load_in_8bit",
            fix="pip install bitsandbytes, or --load_in_4bit false to train on unquantised weights",
        ) from error


def _from_pretrained(path: str, name: str, options: dict[str, Any]) -> Any:
    if os.path.isdir(path) and not os.path.exists(os.path.join(path, "config.json")):
        raise UserError("This folder is not a model: it has no config.json.", where=path)
    try:
        return AutoModelForCausalLM.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        raise _no_such_model(name, error) from error
    except (SafetensorError, ImportError, RuntimeError) as error:
        raise UserError(f"The model cannot be loaded: {str(error).splitlines()[0]}", where=name) from error


def _no_such_model(name: str, error: Exception) -> UserError:
    return UserError(
        f"The model could not be loaded: {str(error).splitlines()[0]}",
        where=name,
        fix="smollm2-135m needs no hub; otherwise give a hub id, or the path of a folder with config.json",
    )
