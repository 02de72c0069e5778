"""Merging: the sum is exact, the folder is plain, and nothing is left when it is not the model that was trained."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from align_unlearn.audit.subjects import load_adapter, read_settings
from align_unlearn.errors import UserError
from align_unlearn.export.merge import merge
from align_unlearn.export.verify import compare
from align_unlearn.modeling.plain import dequantised, merged_weights, plain_copy
from align_unlearn.run_dir import RunDir
from align_unlearn.training.job import train
from align_unlearn.training.recipe import load_recipe

SETTINGS = (
    "--forget_dataset builtin:chronicle@forget --retain_dataset builtin:chronicle@retain --max_steps 3 "
    "--learning_rate 3e-2 --save_strategy no --max_length 512 --audit_limit 3 --audit_tokens 6 --disable_tqdm true"
)


def quiet(line):
    """Nothing is printed in tests."""


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    import os

    os.environ["ALIGN_UNLEARN_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    out = tmp_path_factory.mktemp("runs") / "run"
    words = ["--model_name_or_path", str(tiny), "--output_dir", str(out), *SETTINGS.split()]
    return train(load_recipe(None, words), say=quiet)


def test_merged_weights_are_base_plus_update(run):
    model, _ = load_adapter(run, read_settings(run.path)[1])
    weights = merged_weights(model, torch.float32)
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    scaling = layer.scaling["default"]
    update = scaling * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    expected = dequantised(layer.base_layer) + update.detach()
    torch.testing.assert_close(weights["model.layers.0.mlp.up_proj.weight"], expected, rtol=1e-6, atol=1e-7)
    assert float(update.abs().max()) > 0


def test_a_plain_copy_answers_like_the_adapter_model_and_like_its_base(run, tokenizer):
    model, _ = load_adapter(run, read_settings(run.path)[1])
    ids = torch.tensor([tokenizer("What trade did she follow?").input_ids])
    with torch.no_grad():
        torch.testing.assert_close(
            plain_copy(model, torch.float32)(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-4
        )
        base = plain_copy(model, torch.float32, adapters_off=True)
        with model.disable_adapter():
            torch.testing.assert_close(base(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-4)
    before = [parameter.clone() for parameter in model.parameters()]
    for parameter in base.parameters():
        parameter.data.zero_()
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True)), "the copy is a copy"


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_a_scale_that_leaves_no_model_is_refused(run, tmp_path, scale):
    with pytest.raises(UserError, match="cannot be multiplied"):
        merge(run.path, tmp_path / "merged", scale=scale, say=quiet)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_written_folder_is_the_adapter_model(run, tmp_path, dtype):
    # A random model's logits are far apart for small changes of its weights, so bf16 is held to its own bound here.
    if dtype == "float32":
        folder, parity = merge(run.path, tmp_path / "merged", dtype=dtype, say=quiet)
        assert parity.kl < 1e-6
        assert parity.same_answers == parity.same_verdicts == 1.0
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["kind"] == "export"
        assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {f.name for f in folder.iterdir()}
        assert "quantization_config" not in json.loads((folder / "config.json").read_text())
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert not any("lora" in name for name in plain.state_dict())
    else:
        model, tokenizer = load_adapter(run, read_settings(run.path)[1])
        from align_unlearn.export.merge import save_plain

        save_plain(model, tmp_path, torch.bfloat16)
        tokenizer.save_pretrained(tmp_path)
        parity = compare(model, tokenizer, tmp_path, torch.bfloat16, read_settings(run.path)[0])
        assert parity.kl < 0.05


def test_a_folder_that_is_another_model_is_refused_and_removed(run, tmp_path, monkeypatch):
    import align_unlearn.modeling.plain as module

    def forgetful(layer, name, adapters):
        return dequantised(layer.get_base_layer())

    monkeypatch.setattr(module, "merged_layer", forgetful)
    with pytest.raises(UserError, match="not the model that was trained"):
        merge(run.path, tmp_path / "merged", dtype="float32", say=quiet)
    assert not list(tmp_path.iterdir())


def test_destination_that_is_not_empty(run, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        merge(run.path, tmp_path, say=quiet)
    assert (tmp_path / "file").read_text() == "mine"


def test_unknown_dtype_and_unfinished_run(run, tmp_path):
    with pytest.raises(UserError, match="bfloat16"):
        merge(run.path, tmp_path / "a", dtype="int3", say=quiet)
    with pytest.raises(UserError, match="run folder"):
        RunDir.finished(tmp_path)
    (tmp_path / "manifest.json").write_text('{"kind": "run"}')
    with pytest.raises(UserError, match="not finished"):
        RunDir.finished(tmp_path)


def test_adapter_from_another_base(run, tmp_path):
    from conftest import make_model, make_tokenizer

    other = tmp_path / "other"
    make_model(seed=7).save_pretrained(other)
    make_tokenizer().save_pretrained(other)
    _, config = read_settings(run.path)
    config.model_name_or_path = str(other)
    with pytest.raises(UserError, match="not the one this adapter was trained on"):
        load_adapter(run, config)
