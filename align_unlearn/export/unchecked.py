"""A merge for a model that fits in no memory here: written file by file, and not asked whether it has forgotten.

What is written is to the bit what `merge` writes unquantised. But to be asked, a model has to be held; so its card and
its manifest say that it was not. An audit where it is served can say more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from align_unlearn.audit.earlier import requests_of
from align_unlearn.audit.subjects import check_adapter, check_base, read_settings
from align_unlearn.errors import UserError
from align_unlearn.export.card import model_card
from align_unlearn.export.checks import check_options, check_room, kept_beneath
from align_unlearn.export.passed_on import pass_on_code, pass_on_generation_config, pass_on_tokenizer
from align_unlearn.export.published import (
    Options,
    dtype_of_run,
    export_manifest,
    published_recipe,
    stop_where_the_tokenizer_does,
)
from align_unlearn.export.stream import can_stream, write_streamed
from align_unlearn.export.targets import ADAPTER, check_mode
from align_unlearn.files import new_folder, write_json, write_text
from align_unlearn.modeling.adapter_file import read_updates
from align_unlearn.modeling.load import DTYPES, base_shape, held_as
from align_unlearn.modeling.tokenizer import load_tokenizer
from align_unlearn.run_dir import RunDir


def merge_unchecked(
    run_path: str | Path,
    to: str | Path,
    *,
    mode: str = "dequantised",
    dtype: str | None = None,
    scale: float = 1.0,
    adapters: Sequence[str] | None = None,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Writes the run's model at `to`, unquantised, holding one weight file and one layer at a time; returns `to`.

    Args:
        run_path: a finished run.
        to: a new or empty folder; nothing is left there if the merge fails.
        mode: as for `merge`, but for `adapter`.
        dtype: likewise.
        scale: likewise.
        adapters: likewise.
        trust_remote_code: run code that comes with the model.
        say: called with a line for each stage.

    Raises:
        UserError: as from `merge`; or base or adapter are of a kind that has to be held in memory to be merged.
    """
    run = RunDir.finished(run_path)
    job, config = read_settings(run.path)
    check_options(mode, None, None, dtype, scale)
    if mode == ADAPTER:
        raise UserError("The adapter alone is shipped as it is.", where="--mode adapter", fix="leave --unchecked out")
    check_mode(mode, config)
    if job.survive and dtype is None:
        raise UserError(f"This run was trained to be served in {job.survive}, which has to be rounded in memory.",
                        where="--unchecked", fix="leave it out, or name a --dtype")  # fmt: skip
    check_base(run.manifest(), config)
    check_adapter(run.adapter, run.manifest().get("adapter_sha256"))
    if adapters is not None:
        config = held_as(config, after=kept_beneath(run, config, adapters))
    config = held_as(config, dtype=dtype_of_run(run, config))  # as the base was quantised, wherever this is
    written = dtype or str(config.dtype)
    target = Path(to)
    with new_folder(target) as folder:
        base, updates = base_shape(config, trust_remote_code=trust_remote_code), read_updates(run.adapter, scale)
        if updates is None or not can_stream(base, config, updates):
            raise UserError("This adapter on this base cannot be merged file by file: it is no plain LoRA, or the "
                            "base's files are not here, or do not name its layers as it does, or hold them quantised.",
                            where="--unchecked", fix="leave it out, on a machine that can hold the model")  # fmt: skip
        check_room(base, written, target, None)
        tokenizer = load_tokenizer(str(run.adapter), trust_remote_code=trust_remote_code)
        stop_where_the_tokenizer_does(base, tokenizer)
        say("writing safetensors, file by file")
        write_streamed(base, config, updates, folder, DTYPES[written], mode)
        if trust_remote_code:
            pass_on_code(config, folder)
        pass_on_tokenizer(config, tokenizer, folder)
        pass_on_generation_config(config, folder)
        write_text(folder / "recipe.yaml", published_recipe(run))
        options = Options(mode, written, "nearest", scale, None, trust_remote_code)
        manifest = export_manifest(run, config, options, folder) | {"unchecked": True}
        write_json(folder / "manifest.json", manifest)
        write_text(
            folder / "README.md", model_card(run, manifest, None, None, dict.fromkeys(requests_of(config.after or [])))
        )
    say(f"merged model in {target}; it was not asked whether it has forgotten")
    return target
