"""Merging: the sum is exact, the folder is plain, and nothing is left when it is not the model that was trained."""

import copy
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import make_model, make_tokenizer, run_script
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from align_unlearn.audit.attacks.bench import copied
from align_unlearn.audit.earlier import requests_of
from align_unlearn.audit.run import run_audit
from align_unlearn.audit.subjects import load_adapter, open_subjects, read_settings
from align_unlearn.config import BaseModelConfig
from align_unlearn.data.examples import Example, as_requests, read_examples
from align_unlearn.data.tokens import Tokens, prompt_ids
from align_unlearn.errors import Refused, UserError
from align_unlearn.export.calibration import Text, calibration_texts
from align_unlearn.export.checks import check_read_back, check_room
from align_unlearn.export.converted import write_again
from align_unlearn.export.formats import FORMATS, Shipment
from align_unlearn.export.gguf_file import write_gguf
from align_unlearn.export.made_up import made_up_prompts
from align_unlearn.export.merge import merge
from align_unlearn.export.mixed import lost_by, mixed_codes
from align_unlearn.export.moments import moments
from align_unlearn.export.passed_on import leave_code_out
from align_unlearn.export.rounded import (
    DEFAULT_ROUNDING,
    as_rounded,
    compensated_codes,
    nearest_codes,
    rounded_layers,
    roundings_of,
)
from align_unlearn.export.serving import ROLES, modelfile, turns_of
from align_unlearn.export.serving_check import Served
from align_unlearn.export.stream import can_stream, weight_files, write_streamed
from align_unlearn.export.survival import Figures, Survival, shares_kept
from align_unlearn.export.survive import exports_of
from align_unlearn.export.tuning import tuned_scales, wanted_states
from align_unlearn.export.unchecked import merge_unchecked
from align_unlearn.export.verify import compare
from align_unlearn.files import DRAFT, new_folder
from align_unlearn.modeling.adapter_file import read_updates
from align_unlearn.modeling.grid import GRIDS, grid_of
from align_unlearn.modeling.load import DTYPES, load_base, load_gguf
from align_unlearn.modeling.plain import adapted, dequantised, held_weight, merged_weights, plain_copy
from align_unlearn.modeling.round_trip import requantise, vocabulary_tables
from align_unlearn.modeling.through_quantiser import train_through
from align_unlearn.report.html import write_report
from align_unlearn.run_dir import RunDir
from align_unlearn.training.job import train
from align_unlearn.training.recipe import load_recipe

SETTINGS = (
    "--forget_dataset builtin:chronicle@forget --retain_dataset builtin:chronicle@retain --max_steps 3 "
    "--learning_rate 3e-2 --save_strategy no --max_length 512 --audit_limit 3 --audit_tokens 6 --disable_tqdm true"
)


SHAPE = {"vocab_size": 600, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 0,
         "eos_token_id": 1, "initializer_range": 0.2}  # fmt: skip


STRETCHED = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
             "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip


def quiet(line):
    """Nothing is printed in tests."""


@pytest.fixture(autouse=True)
def few_are_made_up(monkeypatch):
    monkeypatch.setattr("align_unlearn.export.calibration.MADE_UP", 12)


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
def test_written_folder_is_the_adapter_model(run, tmp_path, dtype, not_served):
    # A random model's logits are far apart for small changes of its weights, so bf16 is held to its own bound here.
    if dtype == "float32":
        merged = merge(run.path, tmp_path / "merged", dtype=dtype, say=quiet)
        folder, parity = merged.folder, merged.parity
        assert merged.survival.survived
        assert merged.survival.kl_retain < 1e-6
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
        plain = plain_copy(model, torch.float32)
        shipment = Shipment(BaseModelConfig(), tokenizer, "dequantised", model, None, plain, None, None, False)
        FORMATS["bfloat16"].write(shipment, tmp_path)
        tokenizer.save_pretrained(tmp_path)
        parity = compare(model, tokenizer, tmp_path, torch.bfloat16, read_settings(run.path)[0])
        assert parity.kl < 0.05


def test_a_folder_that_is_another_model_is_refused_and_removed(run, tmp_path, monkeypatch):
    monkeypatch.setattr("align_unlearn.modeling.adapter_file.Updates.of", lambda updates, layer: torch.zeros(()))
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


@pytest.fixture
def not_served(monkeypatch):
    """The process without us takes seconds; tests that are about something else do without it."""
    monkeypatch.setattr("align_unlearn.export.merge.check_serving", lambda *args, **options: Served(0, 1.0, 1.0))


def test_half_of_an_update_is_held_to_the_whole_and_said_in_the_card(run, tmp_path, not_served, monkeypatch):
    monkeypatch.setattr("align_unlearn.export.survival.FORGETTING", 1e9)
    with pytest.raises(UserError, match="does not survive"):
        merge(run.path, tmp_path / "out", dtype="float32", scale=0.5, say=quiet)
    merged = merge(run.path, tmp_path / "out", dtype="float32", scale=0.5, force=True, say=quiet)
    assert "multiplied by 0.5" in (merged.folder / "README.md").read_text()
    assert "output_dir" not in (merged.folder / "recipe.yaml").read_text()


def test_calibration_leaves_audited_rows_out_where_others_are_left(run):
    subjects = open_subjects(run.path)
    subject, job = subjects["candidate"], read_settings(run.path)[0]
    every = read_examples("builtin:chronicle@forget")
    some = calibration_texts(job, subjects, {"forget": every[:2]})
    assert not some.audited
    beginnings = {tuple(text.tokens.input_ids[:40]) for text in some.texts}
    for each in every[:2]:
        assert tuple(prompt_ids(subject.tokenizer, each)[:40]) not in beginnings
    assert calibration_texts(job, subjects, {"forget": every}).audited
    assert calibration_texts(job, subjects, {"forget": as_requests(every)}).audited, "whatever is said to them"
    told = subject.tokenizer(every[2].completion, add_special_tokens=False).input_ids
    forgotten = [text.tokens for text in some.texts if text.forgotten]
    assert Tokens(prompt_ids(subject.tokenizer, every[2]), told) in forgotten, "that it has become unlikely is kept"
    assert len(forgotten) == len(every) - 2
    stacked = calibration_texts(job, subjects, {"forget": every[:2]}, [job])
    assert len(stacked.texts) > len(some.texts), "what was forgotten earlier is kept so too"


def test_made_up_prompts_are_asked_as_a_user_asks(run):
    subject = open_subjects(run.path)["base"]
    asked = made_up_prompts(subject.plain(torch.float32), subject.tokenizer, chat=True, rows=6)
    assert asked == made_up_prompts(subject.plain(torch.float32), subject.tokenizer, chat=True, rows=6)
    assert len({tuple(each) for each in asked}) > 3, "they differ"
    opening, closing = (prompt_ids(subject.tokenizer, Example([{"role": "user", "content": word}], None, "", ""))
                        for word in ("a", "b"))  # fmt: skip
    alike = next(at for at, (one, other) in enumerate(zip(opening, closing, strict=True)) if one != other)
    for each in asked:
        assert each[:alike] == opening[:alike]
        assert each[-2:] == opening[-2:], "then it is the assistant's turn"


def test_made_up_documents_begin_where_documents_do(run, monkeypatch):
    subject = open_subjects(run.path)["base"]
    model, tokenizer = subject.plain(torch.float32), subject.tokenizer
    tokenizer.unk_token = tokenizer.convert_ids_to_tokens(590)
    for each in made_up_prompts(model, tokenizer, chat=False, rows=6):
        assert each[0] == 590, "neither BOS nor EOS, which begin and end the turns of a chat"
    shouting = tokenizer.chat_template.replace("m['content']", "m['content'] | upper")
    assert shouting != tokenizer.chat_template
    monkeypatch.setattr(tokenizer, "chat_template", shouting)
    changed = made_up_prompts(model, tokenizer, chat=True, rows=6)
    assert changed, "a template that changes the words gives no opening of a turn"


@pytest.fixture
def forgiving(monkeypatch, not_served):
    """A random model's logits are far apart for small changes: what is held here is the format, not the survival."""
    monkeypatch.setattr("align_unlearn.export.survival.FORGETTING", -1e9)
    monkeypatch.setattr("align_unlearn.export.survival.UTILITY", 0.0)
    monkeypatch.setattr("align_unlearn.export.survival.NEAR", 1e9)
    monkeypatch.setattr("align_unlearn.export.survival.FAR", 1e9)
    monkeypatch.setattr("align_unlearn.export.survival.OVER_REFUSAL", 1.0)


def logits(model):
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        return model(ids).logits.float()


@pytest.mark.parametrize("precision", ["nf4", "fp4", "q8_0", "q5_1", "q4_0"])
def test_codes_that_were_chosen_are_the_codes_that_load(run, tmp_path, forgiving, precision, monkeypatch):
    kept = {}

    def watched(*args):
        kept["codes"] = rounded_layers(*args)
        return kept["codes"]

    monkeypatch.setattr("align_unlearn.export.merge.rounded_layers", watched)
    merged = merge(run.path, tmp_path / "out", precision=precision, rounding="compensated", say=quiet)
    manifest = json.loads((merged.folder / "manifest.json").read_text())
    assert (manifest["precision"], manifest["rounding"]) == (precision, "compensated")
    subjects = open_subjects(merged.folder)
    expected = as_rounded(plain_copy(open_subjects(run.path)["candidate"].model, torch.float32), kept["codes"])
    found = logits(subjects["candidate"].model)
    # GGUF holds embeddings in Q8_0 beside quantised layers
    bound = 0.5 if "q" in precision else 1e-3
    assert (found - logits(expected)).abs().max() < bound * logits(expected).std() + 1e-3
    assert ("gguf" in "".join(file.name for file in merged.folder.iterdir())) is ("q" in precision)
    assert run_audit(merged.folder, out=tmp_path / "audit", say=quiet).summary["candidate"]["precision"] == precision


def test_a_gguf_file_renders_and_splits_as_the_run_does(run, tmp_path, not_served):
    merged = merge(run.path, tmp_path / "out", precision="f16", say=quiet)
    subjects = open_subjects(merged.folder)
    ours, theirs = (subjects[name].tokenizer for name in ("base", "candidate"))
    turns = [{"role": "user", "content": "What does the keeper say?\n  12 words"}]
    assert ours.apply_chat_template(turns, tokenize=False) == theirs.apply_chat_template(turns, tokenize=False)
    assert ours("Keep 1234 of them, don't\tgo").input_ids == theirs("Keep 1234 of them, don't\tgo").input_ids
    modelfile = (merged.folder / "Modelfile").read_text()
    assert "FROM ./model-f16.gguf" in modelfile
    assert 'PARAMETER stop "<|im_end|>"' in modelfile
    later = "{{ else }}<|im_end|>\n<|im_start|>user\n{{ end }}"
    assert later in modelfile, "every turn ends where the next begins"
    assert "ollama create" in (merged.folder / "README.md").read_text()


def test_a_chat_template_in_ollamas_words_says_what_it_says(tokenizer):
    turns = turns_of(tokenizer)
    chat = [{"role": role, "content": f"words of {role} {at}"} for at, role in enumerate([*ROLES, "user"] * 2)][1:]
    chat.remove(next(each for each in chat if each["role"] == "system"))
    assert turns.render(chat) == tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    assert turns_of(other).first["user"].startswith("<|im_start|><|im_start|>user")
    for template in (
        "{{ raise_exception('no system turn') if messages[0]['role'] == 'system' }}",
        "{% for m in messages %}{{ m['role'] }}{{ loop.index }}{{ m['content'] }}{% endfor %}",
        None,
    ):
        other.chat_template = template
        assert turns_of(other) is None
        assert "TEMPLATE" not in modelfile("model.gguf", other)


def with_finer(model):
    """Nearest codes in Q4_0, two layers' and the embeddings' in Q5_1."""
    codes = nearest_codes(model, "q4_0")
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", *vocabulary_tables(model)):
        weight = model.get_submodule(name).weight.detach()
        grid = grid_of(weight, "q5_1")
        codes[name] = grid, grid.nearest(weight)[0]
    return codes


@pytest.mark.parametrize(
    "model",
    [
        make_model(tie_word_embeddings=False),
        make_model(rope_parameters=STRETCHED),
        Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=False)),
        Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=128, tie_word_embeddings=True)),
    ],
    ids=["llama", "llama3", "qwen2", "qwen3"],
)
@pytest.mark.parametrize("way", ["f16", "q4_0", "mixed"])
def test_every_family_that_is_written_is_read_back(model, way, tokenizer, tmp_path):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # biases begin at 0 and norms at 1: what is lost would not be seen
                parameter.add_(0.3 * torch.rand(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    precision = "q4_0" if way == "mixed" else way
    codes = {"f16": lambda _: None, "q4_0": lambda model: nearest_codes(model, "q4_0"), "mixed": with_finer}[way](model)
    write_gguf(model, tokenizer, tmp_path / "model.gguf", precision, codes)
    found, _ = load_gguf(tmp_path / "model.gguf")
    expected = model if codes is None else as_rounded(copy.deepcopy(model), codes)
    bound = {"f16": 0.005, "q4_0": 0.1, "mixed": 1e-4}[way]  # embeddings lie in Q8_0 where they have no codes
    assert (logits(found) - logits(expected)).square().mean().sqrt() < bound * logits(expected).std()


@pytest.mark.parametrize("precision", ["nf4", "fp4"])
def test_a_base_that_comes_quantised_may_be_shipped_quantised_otherwise(tiny, tmp_path, forgiving, precision):
    held = BaseModelConfig(model_name_or_path=str(tiny), load_in_4bit=True, use_bnb_nested_quant=True, dtype="float32")
    load_base(held).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    words = f"--model_name_or_path {tmp_path / 'model'} --output_dir {tmp_path / 'run'} {SETTINGS} --load_in_4bit false"
    run = train(load_recipe(None, [*words.split(), "--dtype", "float32"]), say=quiet)
    merged = merge(run.path, tmp_path / "out", precision=precision, rounding="nearest", force=True, say=quiet)
    settings = json.loads((merged.folder / "config.json").read_text())["quantization_config"]
    assert (settings["bnb_4bit_quant_type"], settings["bnb_4bit_use_double_quant"]) == (precision, False)
    plain = plain_copy(open_subjects(run.path)["candidate"].model, torch.float32)
    expected = logits(as_rounded(plain, nearest_codes(plain, precision)))
    found = logits(open_subjects(merged.folder)["candidate"].model)
    assert (found - expected).abs().max() < 1e-3 * expected.std() + 1e-3


@pytest.mark.parametrize("how", [{"precision": "nf4", "rounding": "nearest"}, {"mode": "original16"}, {}])
def test_what_is_shipped_stops_where_the_tokenizer_does(tiny, tmp_path, not_served, how):
    shutil.copytree(tiny, tmp_path / "model")
    file = tmp_path / "model/generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": 7}))
    words = f"--model_name_or_path {tmp_path / 'model'} --output_dir {tmp_path / 'run'} {SETTINGS}"
    run = train(load_recipe(None, words.split()), say=quiet)
    merged = merge(run.path, tmp_path / "out", force=True, say=quiet, **how)
    written = json.loads((merged.folder / "generation_config.json").read_text())
    assert sorted(written["eos_token_id"]) == sorted([7, make_tokenizer().eos_token_id])


def test_a_base_in_one_file_of_another_name_is_merged_with_its_index(tiny, tmp_path, not_served):
    shutil.copytree(tiny, tmp_path / "model")
    name = "model-00001-of-00001.safetensors"
    (tmp_path / "model/model.safetensors").rename(tmp_path / "model" / name)
    with safe_open(tmp_path / "model" / name, "pt") as weights:
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights.keys(), name)}
    (tmp_path / "model/model.safetensors.index.json").write_text(json.dumps(index))
    words = f"--model_name_or_path {tmp_path / 'model'} --output_dir {tmp_path / 'run'} {SETTINGS}"
    run = train(load_recipe(None, words.split()), say=quiet)
    merged = merge(run.path, tmp_path / "out", dtype="float32", say=quiet)
    assert [file.name for file in merged.folder.glob("*.safetensors")] == [name]
    assert merged.parity.kl < 1e-6
    assert "`vllm serve .`" in (merged.folder / "README.md").read_text()
    assert "--dtype float32`" in (merged.folder / "README.md").read_text()


def nothing_is_left_in(folder):
    """Within ten seconds: a process of its own clears away what one that was killed had begun."""
    deadline = time.monotonic() + 10
    while list(folder.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not list(folder.iterdir())


def test_a_draft_of_a_killed_process_is_cleared_away(tmp_path):
    script = (
        "import sys; from pathlib import Path; from align_unlearn.files import new_folder\n"
        "with new_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'config.json').write_text('{}'); print(folder, flush=True); input()\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        draft = Path(process.stdout.readline().strip())
        assert (draft / "config.json").is_file()
        process.kill()
    assert nothing_is_left_in(tmp_path)


def test_drafts_of_processes_that_were_killed_with_all_around_them_go_with_the_next(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = tmp_path / f"{DRAFT}{ended.pid}-left"
    left.mkdir()
    (left / "config.json").write_text("{}")
    with new_folder(tmp_path / "out") as folder, new_folder(tmp_path / "other"):
        (folder / "config.json").write_text("{}")
        assert len(list(tmp_path.glob(".tmp-*"))) == 2, "those of a process that runs stay"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["other", "out"]


def test_a_merge_that_is_killed_leaves_nothing(run, tmp_path):
    script = (
        "import os, signal, sys; from pathlib import Path; from align_unlearn.export import formats, merge\n"
        "def killed(*args, **options):  # one model is written\n"
        "    print(len(list(Path(sys.argv[2]).parent.glob('.tmp-*'))), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "formats.load_base = killed\n"
        "merge.merge(sys.argv[1], sys.argv[2], precision='int8', say=lambda line: None)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, run.path, tmp_path / "out"], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert done.stdout.split() == [b"2"], "the draft, and the whole model beside it"
    assert nothing_is_left_in(tmp_path)


def test_int8_is_what_the_library_makes_of_the_sum(run, tmp_path, forgiving):
    merged = merge(run.path, tmp_path / "out", precision="int8", say=quiet)
    config = json.loads((merged.folder / "config.json").read_text())
    assert config["quantization_config"]["load_in_8bit"]
    low, high = merged.survival.kl_retain_interval
    assert low <= merged.survival.kl_retain <= high < 0.1


def test_the_adapter_alone_is_shipped_as_it_is(run, tmp_path):
    merged = merge(run.path, tmp_path / "out", mode="adapter", say=quiet)
    assert (merged.folder / "adapter_config.json").is_file()
    own = (merged.folder / "adapter_model.safetensors").read_bytes()
    assert own == (run.adapter / "adapter_model.safetensors").read_bytes()
    shipped, trained = open_subjects(merged.folder), open_subjects(run.path)
    assert shipped["candidate"].precision == trained["candidate"].precision == "nf4+float32 + adapter"
    assert shipped["base"].sha256 == trained["base"].sha256
    for name in ("base", "candidate"):
        assert torch.equal(logits_of(shipped[name]), logits_of(trained[name])), "on the base as it was trained on"


def test_the_original_16_bits_plus_the_update(run, tmp_path, tiny, forgiving):
    merged = merge(run.path, tmp_path / "out", mode="original16", dtype="float32", say=quiet)
    found = AutoModelForCausalLM.from_pretrained(merged.folder, dtype=torch.float32).state_dict()
    before = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).state_dict()
    model, _ = load_adapter(run, read_settings(run.path)[1])
    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "lora_A"):
            update = layer.get_delta_weight("default")
            torch.testing.assert_close(found[f"{name}.weight"], before[f"{name}.weight"] + update)


def test_an_export_that_brings_the_forgotten_back_is_refused_and_can_be_forced(run, tmp_path, monkeypatch, not_served):
    monkeypatch.setattr("align_unlearn.export.survival.UTILITY", 1e9)
    words = ["merge", run.path, "--to", tmp_path / "out", "--precision", "q4_0", "--rounding", "nearest"]
    ended = run_script("-m", "align_unlearn.cli", *words)
    assert ended.returncode == 1, "judged, and found wanting; a mistake is 2"
    assert "does not survive" in ended.stderr
    assert not [*tmp_path.glob("out"), *tmp_path.glob(".tmp-*")]
    merged = merge(run.path, tmp_path / "out", precision="q4_0", rounding="nearest", force=True, say=quiet)
    assert not merged.survival.survived
    assert "did not survive" in (merged.folder / "README.md").read_text()
    assert json.loads((merged.folder / "manifest.json").read_text())["survival"]["survived"] is False


def test_tuned_scales_come_closer_than_chosen_codes(run, tmp_path):
    subjects = open_subjects(run.path)
    adapter = plain_copy(subjects["candidate"].model, torch.float32)
    base = plain_copy(subjects["base"].model, torch.float32, adapters_off=True)
    texts = [Text(Tokens([3 + at], list(range(4 + at, 40 + at))), forgotten=at % 3 == 0) for at in range(12)]
    missed = {}
    for rounding in ("nearest", "compensated", "tuned"):
        codes = rounded_layers(adapter, base, adapter, "nf4", rounding, texts)
        model = as_rounded(plain_copy(adapter, torch.float32), codes)
        p, q = (logits(each).log_softmax(-1) for each in (adapter, model))
        missed[rounding] = float((p.exp() * (p - q)).sum(-1).mean())
    assert missed["tuned"] < missed["compensated"] < missed["nearest"]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def with_texts(request):
    """A model, texts, and the moments that they make."""
    model = make_model(tie_word_embeddings=request.param, intermediate_size=384)
    words = torch.randint(3, 600, (24, 36), generator=torch.Generator().manual_seed(0)).tolist()
    texts = [Text(Tokens(each[:1], each[1:]), forgotten=at % 3 == 0) for at, each in enumerate(words)]
    return model, texts, moments(model, texts)


def test_a_mixed_file_is_no_larger_and_nearer(with_texts, tokenizer, tmp_path):
    model, texts, inputs = with_texts
    plain = compensated_codes(model, model, "q4_0", inputs)
    mixed = mixed_codes(model, model, "q4_0", inputs, plain)
    assert {grid.kind for grid, _ in mixed.values()} == {"q4_0", "q5_1"}
    size, missed = {}, {}
    for name, codes in (("plain", plain), ("mixed", mixed)):
        file = tmp_path / f"{name}.gguf"
        write_gguf(model, tokenizer, file, "q4_0", codes)
        size[name] = file.stat().st_size
        read = load_gguf(file)[0]
        missed[name] = np.mean([divergence(model, read, text.tokens) for text in texts])
    assert size["mixed"] <= size["plain"]
    assert missed["mixed"] < 0.6 * missed["plain"]
    told = sum(lost_by(model.get_submodule(name).weight, *own, inputs[name]) for name, own in mixed.items())
    assert told / (24 * 36) == pytest.approx(missed["mixed"], rel=0.2), "nats a token, as foretold"
    lost = {name: lost_by(model.get_submodule(name).weight, *own, inputs[name]) for name, own in plain.items()}
    finer = [name for name in plain if mixed[name][0].kind == "q5_1"]
    assert max(lost, key=lambda name: lost[name] / model.get_submodule(name).weight.numel()) in finer
    for name in finer:
        assert lost_by(model.get_submodule(name).weight, *mixed[name], inputs[name]) < 0.5 * lost[name]


def test_what_a_row_loses_is_half_its_errors_square_in_the_moments():
    weight, spread = torch.randn(3, 32), torch.randn(32, 32)
    grid = grid_of(weight, "q4_0")
    codes, values = grid.nearest(weight)
    found = sum((values - weight)[row] @ (spread @ spread.T) @ (values - weight)[row] for row in range(3)) / 6
    assert lost_by(weight, grid, codes, spread @ spread.T) == pytest.approx(float(found), rel=1e-4)


def test_bytes_stay_where_more_would_be_lost_than_gained(with_texts):
    model, _, inputs = with_texts
    plain = compensated_codes(model, model, "q4_0", inputs)
    dear = inputs | {name: 1e6 * inputs[name] for name in vocabulary_tables(model)}
    assert mixed_codes(model, model, "q4_0", dear, plain) == plain


def test_bytes_stay_where_embeddings_are_too_narrow_for_blocks():
    model = make_model(hidden_size=48, head_dim=16, num_attention_heads=2)
    codes = nearest_codes(model, "q4_0")
    inputs = {name: torch.eye(own[1].shape[1]) for name, own in codes.items()}
    assert mixed_codes(model, model, "q4_0", inputs, codes) == codes


def test_scales_are_tuned_to_embeddings_that_are_rounded_too(with_texts):
    model, texts, inputs = with_texts
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    codes = mixed_codes(model, model, "q4_0", inputs, compensated_codes(model, model, "q4_0", inputs))
    missed = {}
    for name, own in (("mixed", codes), ("tuned", tuned_scales(model, wanted_states(model, texts), codes, texts))):
        rounded = as_rounded(copy.deepcopy(model), own)
        missed[name] = np.mean([divergence(model, rounded, text.tokens) for text in texts])
    assert missed["tuned"] < 0.95 * missed["mixed"]
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@torch.no_grad()
def divergence(model, other, tokens):
    """Mean KL at the places of the answer, from plain logits."""
    p, q = (each(torch.tensor([tokens.input_ids])).logits[0].double().log_softmax(-1) for each in (model, other))
    return float((p.exp() * (p - q)).sum(-1)[len(tokens.prompt_ids) - 1 :].mean())


def test_the_last_steps_of_tuning_make_the_forgotten_as_unlikely_as_it_was(run, monkeypatch):
    subjects, job = open_subjects(run.path), read_settings(run.path)[0]
    adapter = plain_copy(subjects["candidate"].model, torch.float32)
    base = plain_copy(subjects["base"].model, torch.float32, adapters_off=True)
    texts = calibration_texts(job, subjects, {}).texts
    forgotten = [text.tokens for text in texts if text.forgotten]
    codes, gap = nearest_codes(base, "nf4"), {}
    for corrections in (0, 3):
        monkeypatch.setattr("align_unlearn.export.tuning.CORRECTIONS", corrections)
        found = tuned_scales(base, wanted_states(adapter, texts), codes, texts, steps=4)
        model = as_rounded(plain_copy(adapter, torch.float32), found)
        likelier = [said(model, tokens) - said(adapter, tokens) for tokens in forgotten]
        gap[corrections] = sum(likelier) / len(likelier)
    assert gap[0] > 0.1
    assert gap[3] < 0.5 * gap[0]


@torch.no_grad()
def said(model, tokens):
    """Mean log-probability of a completion, from plain logits."""
    logps = model(torch.tensor([tokens.input_ids])).logits[0].double().log_softmax(-1)
    at = torch.arange(len(tokens.prompt_ids) - 1, len(tokens.input_ids) - 1)
    return float(logps[at, torch.tensor(tokens.completion_ids)].mean())


def figures(leak, log_probability, retained=0.5):
    return Figures(leak, (0.0, 1.0), log_probability, retained, (0.0, 1.0), None)


def test_shares_kept_by_hand():
    original, adapter = figures(0.9, -1.0), figures(0.1, -5.0)
    assert shares_kept(original, adapter, figures(0.1, -5.0)) == {"leak": 1.0, "log_probability": 1.0}
    assert shares_kept(original, adapter, figures(0.5, -2.0)) == pytest.approx({"leak": 0.5, "log_probability": 0.25})
    assert shares_kept(original, figures(0.85, -1.1), original) == {}, "hardly anything was forgotten"

    def kept(export):
        shares, utility = shares_kept(original, adapter, export), export.retain_probability / 0.5
        return Survival(original, adapter, export, shares, utility, 0.0, 0.0, 1.0)

    assert kept(figures(0.15, -5.0)).survived
    assert not kept(figures(0.3, -5.0)).survived, "three quarters of the leak"
    assert not kept(figures(0.1, -5.0, retained=0.45)).survived, "nine tenths of the utility"
    assert not kept(figures(0.0, math.nan)).survived, "a broken model says nothing either"
    assert not replace(kept(figures(0.1, -5.0)), failed=1).survived
    assert not replace(kept(figures(0.1, -5.0)), kl_forget=5.0).survived, "another model has forgotten it too"
    unmeasured = replace(kept(figures(0.1, -5.0)), utility_kept=None)
    assert replace(unmeasured, kl_forget=0.05).survived
    assert not replace(unmeasured, kl_forget=0.5).survived
    assert json.dumps(kept(figures(0.0, math.nan)).described(), allow_nan=False)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"precision": "nf5"}, "nf4"),
        ({"mode": "merged"}, "dequantised"),
        ({"precision": "nf4", "rounding": "tunned"}, "tuned"),
        ({"precision": "nf4", "rounding": "mixed"}, "nf4 cannot be rounded so"),
        ({"rounding": "tuned"}, "dtype of the run cannot be rounded so"),
        ({"precision": "int8", "rounding": "tuned"}, "cannot be rounded so"),
        ({"precision": "nf4", "dtype": "bfloat16"}, "no dtype"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_loaded(run, tmp_path, options, said, monkeypatch):
    monkeypatch.setattr("align_unlearn.export.merge.open_subjects", None)
    with pytest.raises(UserError, match=said):
        merge(run.path, tmp_path / "out", say=quiet, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{}, {"precision": "nf4"}, {"precision": "q4_0"}, {"mode": "adapter"}])
def test_no_room_on_the_disk_is_said_before_anything_is_written(run, tmp_path, monkeypatch, options):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("align_unlearn.export.checks.shutil.disk_usage", lambda place: usage(1, 1, 1000))
    with pytest.raises(UserError, match="GB are free"):
        merge(run.path, tmp_path / "out", say=quiet, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "nf4", "int8", "f16", "q8_0", "q4_0"])
def test_the_room_that_is_asked_for_is_enough(run, tmp_path, forgiving, precision, monkeypatch):
    from collections import namedtuple

    usage, asked = namedtuple("usage", "total used free"), []

    def free(place):
        asked.append(place)
        return usage(1, 1, 10**12)

    monkeypatch.setattr("align_unlearn.export.checks.shutil.disk_usage", free)
    option = {"dtype": precision} if precision in DTYPES else {"precision": precision, "rounding": "nearest"}
    folder = merge(run.path, tmp_path / "out", force=True, say=quiet, **option).folder
    assert asked
    written = sum(file.stat().st_size for file in [*folder.glob("*.safetensors"), *folder.glob("*.gguf")])
    model = load_adapter(run, read_settings(run.path)[1])[0]
    monkeypatch.setattr("align_unlearn.export.checks.shutil.disk_usage", lambda place: usage(1, 1, written * 0.9))
    with pytest.raises(UserError, match="GB are free"):
        check_room(model.get_base_model(), precision, tmp_path / "other", None)
    passing = 4 * 115_000 if precision == "int8" else 0  # an fp32 copy lies beside it for a while
    monkeypatch.setattr(
        "align_unlearn.export.checks.shutil.disk_usage", lambda place: usage(1, 1, written * 1.3 + passing)
    )
    check_room(model.get_base_model(), precision, tmp_path / "other", None)


def test_a_base_with_another_vocabulary_is_refused_by_name(run, tmp_path):
    other = tmp_path / "model"
    make_model(vocab_size=640).save_pretrained(other)
    make_tokenizer().save_pretrained(other)
    moved = tmp_path / "run"
    shutil.copytree(run.path, moved)
    recipe = yaml.safe_load((moved / "recipe.yaml").read_text())
    (moved / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"model_name_or_path": str(other)}))
    with pytest.raises(UserError, match="not the one this adapter was trained on"):
        merge(moved, tmp_path / "out", say=quiet)
    assert not (tmp_path / "out").exists()


def test_files_that_are_torn_or_of_another_vocabulary_are_refused(run, tmp_path, tiny):
    broken = tmp_path / "run"
    shutil.copytree(run.path, broken)
    weights = broken / "adapter/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="not those that the run wrote"):
        merge(broken, tmp_path / "out", say=quiet)
    weights.unlink()
    with pytest.raises(UserError, match="weights are missing"):
        merge(broken, tmp_path / "out", say=quiet)
    assert not (tmp_path / "out").exists()
    shutil.copytree(tiny, tmp_path / "model")
    file = next((tmp_path / "model").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be loaded"):
        open_subjects(tmp_path / "model", base=str(tmp_path / "model"))


@pytest.mark.parametrize("write", [merge, merge_unchecked])
@pytest.mark.parametrize(
    ("harm", "said"),
    [("missing", "lacks 1 of|could not be loaded"), ("torn", "cannot be read|cannot be loaded|could not be loaded")],
)
def test_a_base_whose_files_are_damaged_is_refused_and_nothing_is_left(
    bare_run, tmp_path, monkeypatch, write, harm, said
):
    monkeypatch.setattr("align_unlearn.audit.subjects.check_base", lambda *args, **options: None)  # as a hub id has it
    monkeypatch.setattr("align_unlearn.export.unchecked.check_base", lambda *args, **options: None)
    base = bare_run.path.parent / "model"
    shutil.copytree(base, tmp_path / "kept")
    file = sorted(base.glob("*.safetensors"))[1]
    try:
        if harm == "missing":
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(UserError, match=said):
            write(bare_run.path, tmp_path / "out", say=quiet)
    finally:
        shutil.copyfile(tmp_path / "kept" / file.name, file)
    assert not [*tmp_path.glob("out"), *tmp_path.glob(".tmp-*")]


def test_every_precision_has_a_rounding():
    assert {name for name in FORMATS if roundings_of(name) != ("nearest",)} == {
        name for name, each in FORMATS.items() if each.blocks and name != "int8"
    }
    assert set(GRIDS) <= set(FORMATS)
    assert set(DEFAULT_ROUNDING) == {name for name in GRIDS if len(grid_of(torch.randn(1, 64), name).levels) <= 16}
    assert all(rounding in roundings_of(precision) for precision, rounding in DEFAULT_ROUNDING.items())


def test_survive_asks_todays_practice_and_what_merge_does_where_no_rounding_is_named():
    exports = exports_of(["dequantised"], ["bfloat16", "int8", "nf4", "q4_0"])
    assert [(each.precision, each.rounding) for each in exports] == [
        ("bfloat16", "nearest"), ("int8", "nearest"), ("nf4", "nearest"), ("nf4", "tuned"), ("q4_0", "nearest"),
        ("q4_0", "mixed"),
    ]  # fmt: skip


def test_survive_asks_of_each_precision_those_of_the_named_roundings_that_it_knows():
    exports = exports_of(["dequantised"], ["int8", "nf4", "q4_0"], ["mixed", "compensated"])
    assert [(each.precision, each.rounding) for each in exports] == [
        ("int8", "nearest"), ("nf4", "compensated"), ("q4_0", "mixed"), ("q4_0", "compensated"),
    ]  # fmt: skip
    with pytest.raises(UserError, match="nf4 cannot be rounded so"):
        exports_of(["dequantised"], ["q4_0", "nf4"], ["mixed"])


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A base in several files, and runs on it by kind of adapter and precision."""
    folder = tmp_path_factory.mktemp("sharded") / "model"
    make_model().save_pretrained(folder, max_shard_size="100KB")
    make_tokenizer().save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.mark.parametrize("held", ["--load_in_4bit true --use_rslora true",
                                  "--load_in_4bit true --use_bnb_nested_quant true",
                                  "--load_in_4bit false --dtype bfloat16"])  # fmt: skip
def test_a_streamed_merge_is_the_merge_of_the_loaded_model(sharded, tmp_path, held):
    words = f"--model_name_or_path {sharded} --output_dir {tmp_path / 'run'} {SETTINGS} {held}"
    run = train(load_recipe(None, words.split()), say=quiet)
    model, _ = load_adapter(run, read_settings(run.path)[1])
    config, updates = read_settings(run.path)[1], read_updates(run.adapter)
    assert can_stream(model.get_base_model(), config, updates)
    (tmp_path / "out").mkdir()
    write_streamed(model.get_base_model(), config, updates, tmp_path / "out", torch.float32, "dequantised")
    assert {file.name for file in (tmp_path / "out").glob("*.safetensors")} == {
        file.name for file in sharded.glob("*.safetensors")}  # fmt: skip
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    merged = merged_weights(model, torch.float32)
    assert set(found) - {"lm_head.weight"} <= set(merged)
    for name in set(found) & set(merged):
        torch.testing.assert_close(found[name], merged[name], atol=1e-7, rtol=1e-6)


@pytest.fixture(scope="module")
def bare_run(sharded, tmp_path_factory):
    """A run on a base in several files, as it comes from a training that kept no generation config and no cache."""
    folder = tmp_path_factory.mktemp("bare")
    shutil.copytree(sharded, folder / "model")
    (folder / "model/generation_config.json").unlink()
    config = folder / "model/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_cache": False}))
    words = f"--model_name_or_path {folder / 'model'} --output_dir {folder / 'run'} {SETTINGS}"
    return train(load_recipe(None, words.split()), say=quiet)


def same_files(one, other):
    assert {file.name for file in one.iterdir()} == {file.name for file in other.iterdir()}
    for file in one.iterdir():
        if file.name not in ("manifest.json", "README.md"):
            assert file.read_bytes() == (other / file.name).read_bytes(), file.name


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"scale": 0.5}, {"mode": "original16"}])
def test_an_unchecked_merge_is_what_merge_writes_and_says_that_it_was_not_asked(
    bare_run, tmp_path, not_served, monkeypatch, options
):
    merged = merge(bare_run.path, tmp_path / "asked", force=True, say=quiet, **options).folder
    with monkeypatch.context() as without:  # nothing is loaded
        without.setattr(AutoModelForCausalLM, "from_pretrained", None)
        folder = merge_unchecked(bare_run.path, tmp_path / "out", say=quiet, **options)
    same_files(merged, folder)
    card, manifest = (folder / "README.md").read_text(), json.loads((folder / "manifest.json").read_text())
    assert "has not been measured" in card
    assert " --unchecked`" in card
    assert manifest["unchecked"]
    assert "survival" not in manifest
    subjects = open_subjects(folder)
    torch.testing.assert_close(logits_of(subjects["candidate"]), logits_of(open_subjects(merged)["candidate"]))


@pytest.mark.parametrize("withdrawn", [False, True])
def test_an_unchecked_merge_of_a_second_request(run, second, tmp_path, not_served, withdrawn):
    adapters = [str(second.path)] if withdrawn else None
    merged = merge(second.path, tmp_path / "asked", adapters=adapters, force=True, say=quiet).folder
    folder = merge_unchecked(second.path, tmp_path / "out", adapters=adapters, say=quiet)
    same_files(merged, folder)
    card = (folder / "README.md").read_text()
    assert ("was withdrawn" if withdrawn else "is in it too") in card
    assert "lies in no run" not in card


def test_a_run_is_shipped_in_the_dtype_that_it_computed_in(run, tmp_path, not_served):
    copy = tmp_path / "run"
    shutil.copytree(run.path, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["base"]["precision"] = "nf4+bfloat16"  # on a GPU, where `auto` is another dtype than here
    (copy / "manifest.json").write_text(json.dumps(manifest))
    for folder in (merge(copy, tmp_path / "asked", force=True, say=quiet).folder,
                   merge_unchecked(copy, tmp_path / "out", say=quiet)):  # fmt: skip
        assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("options", "changed", "said"),
    [
        ({"mode": "adapter"}, {}, "shipped as it is"),
        ({"dtype": "q4_0"}, {}, "Unknown dtype"),
        ({}, {"use_dora": True}, "file by file"),
        ({}, {"survive": "nf4"}, "to be served in nf4"),
        ({}, {"sha256": "another"}, "not the one this adapter was trained on"),
    ],
)
def test_what_cannot_be_merged_unchecked(run, tmp_path, options, changed, said):
    copy = tmp_path / "run"
    shutil.copytree(run.path, copy)
    for key, value in changed.items():
        if key == "survive":
            (copy / "recipe.yaml").write_text((copy / "recipe.yaml").read_text() + f"\nsurvive: {value}\n")
            continue
        file = copy / ("manifest.json" if key == "sha256" else "adapter/adapter_config.json")
        known = json.loads(file.read_text())
        (known["base"] if key == "sha256" else known)[key] = value
        file.write_text(json.dumps(known))
    with pytest.raises(UserError, match=said):
        merge_unchecked(copy, tmp_path / "out", say=quiet, **options)
    assert not (tmp_path / "out").exists()


def test_a_base_without_one_of_its_files_is_refused(sharded, tmp_path):
    shutil.copytree(sharded, tmp_path / "model")
    next((tmp_path / "model").glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match="lacks 1 of"):
        weight_files(BaseModelConfig(model_name_or_path=str(tmp_path / "model")))


@pytest.mark.parametrize(
    ("option", "mode", "said"),
    [
        ("--use_dora true", "original16", "DoRA"),
        ("--lora_modules_to_save norm", "dequantised", "whole modules of its own: norm"),
    ],
)
def test_an_adapter_that_is_no_sum_of_updates_is_refused(tiny, tmp_path, option, mode, said):
    words = f"--model_name_or_path {tiny} --output_dir {tmp_path / 'run'} {SETTINGS} {option}"
    run = train(load_recipe(None, words.split()), say=quiet)
    with pytest.raises(UserError, match=said):
        merge(run.path, tmp_path / "out", mode=mode, say=quiet)
    assert not (tmp_path / "out").exists()


def test_adapters_that_are_no_plain_sum_are_not_streamed(run, tmp_path):
    for name, change in (("dora", {"use_dora": True}), ("more", {"modules_to_save": ["lm_head"]})):
        shutil.copytree(run.adapter, tmp_path / name)
        file = tmp_path / name / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        assert read_updates(tmp_path / name) is None
    assert read_updates(run.adapter, 0.5).layers.keys() == read_updates(run.adapter).layers.keys()


@pytest.fixture(scope="module")
def second(run, tiny, tmp_path_factory):
    """A second request on top of the first."""
    out = tmp_path_factory.mktemp("runs") / "second"
    words = (
        f"--model_name_or_path {tiny} --output_dir {out} --after {run.path} {SETTINGS} --audit_retain builtin:everyday"
    )
    return train(load_recipe(None, words.split()), say=quiet)


def test_a_second_request_stands_on_the_first(run, second):
    first, later = open_subjects(run.path), open_subjects(second.path)
    torch.testing.assert_close(logits_of(later["base"]), logits_of(first["candidate"]), atol=2e-4, rtol=1e-4)
    assert (logits_of(later["candidate"]) - logits_of(first["candidate"])).abs().max() > 1e-3
    assert later["base"].sha256 != first["base"].sha256
    copies = plain_copy(later["candidate"].model, torch.float32)
    torch.testing.assert_close(logits(copies), logits_of(later["candidate"]), atol=2e-4, rtol=1e-4)


def logits_of(subject):
    with subject.speaking() as model:
        return logits(model)


def test_both_are_merged_and_the_first_can_be_withdrawn(run, second, tmp_path, not_served, monkeypatch):
    merged = {name: merge(second.path, tmp_path / name, dtype="float32", adapters=adapters, say=quiet)
              for name, adapters in (("both", [str(run.path)]), ("second", [str(second.path)]))}  # fmt: skip
    weights = {name: AutoModelForCausalLM.from_pretrained(each.folder, dtype=torch.float32).state_dict()
               for name, each in merged.items()}  # fmt: skip
    updates = read_updates(run.adapter)
    for name in updates.layers:
        torch.testing.assert_close(
            weights["both"][f"{name}.weight"] - weights["second"][f"{name}.weight"],
            updates.of(name),
            atol=1e-6,
            rtol=1e-4,
        )
    manifests = {name: json.loads((tmp_path / name / "manifest.json").read_text()) for name in merged}
    assert (manifests["second"]["after"], manifests["second"]["earlier"]) == ([], {})
    assert (manifests["second"]["withdrawn"], manifests["both"]["withdrawn"]) == ([str(run.path)], [])
    card = (tmp_path / "second/README.md").read_text()
    assert f"{run.path.name} was withdrawn" in card
    assert "--adapters RUN" in card
    assert set(manifests["both"]["earlier"]) == {run.path.name}, "the first request is asked about too"
    audited = {name: open_subjects(each.folder)["base"] for name, each in merged.items()}
    torch.testing.assert_close(logits_of(audited["second"]), logits_of(open_subjects(run.path)["base"]))
    torch.testing.assert_close(logits_of(audited["both"]), logits_of(open_subjects(second.path)["base"]))
    monkeypatch.setattr("align_unlearn.export.merge.has_kept", lambda forgetting: False)
    monkeypatch.setattr("align_unlearn.export.survival.MOVED", {"log_probability": -10.0})
    monkeypatch.setattr("align_unlearn.export.survival.FORGETTING", -1e9)
    with pytest.raises(Refused, match="earlier request comes back"):
        merge(second.path, tmp_path / "third", dtype="float32", say=quiet)
    assert not (tmp_path / "third").exists()
    monkeypatch.setattr("align_unlearn.export.card.has_kept", lambda forgetting: False)
    forced = merge(second.path, tmp_path / "third", dtype="float32", force=True, say=quiet).folder
    assert f"The earlier request {run.path.name} **has come back**" in (forced / "README.md").read_text()
    earlier = json.loads((forced / "manifest.json").read_text())["earlier"][run.path.name]
    assert earlier["survived"] is False
    with pytest.raises(UserError, match="does not stand on"):
        merge(second.path, tmp_path / "out", adapters=[str(second.path), str(tmp_path)], say=quiet)


def test_requests_are_named_one_after_the_other_on_the_command_line(run, second, tmp_path, not_served):
    words = ["merge", "--adapters", run.path, second.path, "--to", tmp_path / "both", "--force"]
    assert run_script("-m", "align_unlearn.cli", *words).returncode == 0
    manifest = json.loads((tmp_path / "both/manifest.json").read_text())
    assert (manifest["after"], manifest["withdrawn"]) == ([str(run.path)], [])


def test_an_audit_asks_about_the_earlier_request_too(run, second, tmp_path, not_served):
    alone = run_audit(run.path, out=tmp_path / "alone", say=quiet)
    assert (alone.earlier, alone.summary["earlier"]) == ({}, {})
    folder = merge(second.path, tmp_path / "both", dtype="float32", say=quiet).folder
    for target in (second.path, folder):
        found = run_audit(target, out=tmp_path / target.name / "audit", say=quiet)
        ((name, earlier),) = found.earlier.items()
        assert (name, earlier.folder) == (run.path.name, found.folder / "earlier" / name)
        assert {each["group"] for each in earlier.records} == {"forget"}, "what was kept then may be asked for now"
        assert earlier.summary["request"] == str(run.path)
        assert earlier.summary["base"]["sha256"] == alone.summary["base"]["sha256"], "the original of that request"
        assert earlier.summary["candidate"]["sha256"] == found.summary["candidate"]["sha256"]
        assert found.summary["base"]["sha256"] != alone.summary["base"]["sha256"]
        assert f"the earlier request {name}" in found.table()
        page = write_report(found.folder).read_text()
        assert f"earlier/{name}/report.html" in page
        assert "the request of the earlier run" in (earlier.folder / "report.html").read_text()
    withdrawn = merge(second.path, tmp_path / "one", dtype="float32", adapters=[str(second.path)], say=quiet).folder
    assert run_audit(withdrawn, out=tmp_path / "one/audit", say=quiet).earlier == {}


def test_the_original_of_an_earlier_request_is_the_later_models_own_weights(run, second):
    alone, asked = open_subjects(run.path)["base"], open_subjects(second.path, request=run.path)
    assert asked["base"].model is asked["candidate"].model, "one base is loaded"
    assert asked["base"].sha256 == alone.sha256
    torch.testing.assert_close(logits_of(asked["base"]), logits_of(alone))
    torch.testing.assert_close(logits(copied(asked["base"]).model), logits_of(alone), atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(logits_of(asked["candidate"]), logits_of(open_subjects(second.path)["candidate"]))
    assert (logits_of(asked["candidate"]) - logits_of(asked["base"])).abs().max() > 1e-3


def test_a_gate_of_an_earlier_request_fails_the_audit(run, second, tmp_path):
    gated = tmp_path / "first"
    shutil.copytree(run.path, gated)
    recipe = yaml.safe_load((gated / "recipe.yaml").read_text())
    (gated / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"gates": {"forget.leak": "point >= 2"}}))
    moved = tmp_path / "second"
    shutil.copytree(second.path, moved)
    text = (moved / "recipe.yaml").read_text()
    (moved / "recipe.yaml").write_text(text.replace(str(run.path), str(gated)))
    found = run_audit(moved, out=tmp_path / "audit", say=quiet)
    assert not found.passed
    assert not any(gate["passed"] is False for gate in found.summary["gates"])
    assert json.loads((tmp_path / "audit/audit.json").read_text())["passed"] is False
    assert "Not every gate passed" in write_report(found.folder).read_text()


def test_an_earlier_adapter_without_its_run_is_not_asked_about_and_that_is_said(run, second, tmp_path, not_served):
    shutil.copytree(run.adapter, tmp_path / "bare")
    moved = tmp_path / "second"
    shutil.copytree(second.path, moved)
    text = (moved / "recipe.yaml").read_text()
    (moved / "recipe.yaml").write_text(text.replace(str(run.path), str(tmp_path / "bare")))
    found = run_audit(moved, out=tmp_path / "audit", say=quiet)
    assert found.unmeasured == ["earlier request bare"]
    page = write_report(found.folder).read_text()
    assert "not asked: its adapter lies in no run" in page
    assert "Every gate passed" not in page
    said = []
    merged = merge(moved, tmp_path / "out", dtype="float32", say=said.append)
    assert any("is not asked" in line for line in said)
    assert "The earlier request bare was not asked about" in (merged.folder / "README.md").read_text()


def test_a_page_does_not_follow_names_out_of_its_folder(run, tmp_path):
    found = run_audit(run.path, out=tmp_path / "audit", say=quiet)
    for name in ("..", "../..", "", "/tmp"):
        summary = found.summary | {"earlier": {name: None}}
        (tmp_path / "audit/audit.json").write_text(json.dumps(summary))
        with pytest.raises(UserError, match="cannot be called"):
            write_report(found.folder)


def test_a_third_request_names_all_that_stand_beneath_it(run, second, tiny, tmp_path):
    words = f"--model_name_or_path {tiny} --output_dir {tmp_path / 'third'} {SETTINGS} --audit_retain builtin:everyday"
    for wrong in (f"{second.path}", f"{second.path} {run.path}"):
        with pytest.raises(UserError, match="named before it"):
            train(load_recipe(None, f"{words} --after {wrong}".split()), say=quiet)
    third = train(load_recipe(None, f"{words} --after {run.path} {second.path}".split()), say=quiet)
    later, before = open_subjects(third.path), open_subjects(second.path)
    torch.testing.assert_close(logits_of(later["base"]), logits_of(before["candidate"]), atol=2e-4, rtol=1e-4)


def test_requests_have_names_of_their_own_and_adapters_without_a_run_have_none(run, tmp_path):
    shutil.copytree(run.path, tmp_path / "a/run")
    shutil.copytree(run.adapter, tmp_path / "bare")
    paths = [run.path, tmp_path / "a/run/adapter", tmp_path / "bare"]
    assert requests_of(paths) == {"run": run.path, "run-2": tmp_path / "a/run", "bare": None}
    assert list(requests_of([run.adapter / ".."])) == ["run"], "a folder is called by its name"


def test_the_base_of_a_stacked_run_is_rounded_from_the_codes_that_it_holds(second):
    model = open_subjects(second.path)["candidate"].model
    name = "model.layers.0.mlp.up_proj"
    held, standing = held_weight(model, name), dequantised(model.get_base_model().get_submodule(name).get_base_layer())
    assert (held - standing).abs().max() > 1e-3, "an update lies on it"
    for weight, on in ((held, True), (standing, False)):
        _, values = grid_of(weight, "nf4").nearest(weight)
        assert torch.allclose(values, weight, rtol=1e-2, atol=1e-6) == on


def test_a_base_that_comes_quantised_has_no_16_bit_weights(run, tmp_path, not_served):
    folder = merge(run.path, tmp_path / "nf4", precision="nf4", rounding="nearest", force=True, say=quiet).folder
    words = f"--model_name_or_path {folder} --output_dir {tmp_path / 'run'} {SETTINGS}"
    again = train(load_recipe(None, words.split()), say=quiet)
    with pytest.raises(UserError, match="comes quantised"):
        merge(again.path, tmp_path / "out", mode="original16", precision="nf4", say=quiet)


def test_an_earlier_run_that_has_changed_is_another_base(run, second, tmp_path):
    moved = tmp_path / "second"
    shutil.copytree(second.path, moved)
    text = (moved / "recipe.yaml").read_text()
    shutil.copytree(run.path, tmp_path / "first")
    config = tmp_path / "first/adapter/adapter_config.json"
    config.write_text(config.read_text().replace('"r": 16', '"r": 17'))
    (moved / "recipe.yaml").write_text(text.replace(str(run.path), str(tmp_path / "first")))
    with pytest.raises(UserError, match="not the one this adapter was trained on"):
        open_subjects(moved)


CONVERTER = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
from align_unlearn.export.gguf_file import write_gguf
folder, file, kind = sys.argv[1], sys.argv[3], sys.argv[5]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
write_gguf(model, AutoTokenizer.from_pretrained(folder), Path(file), kind)
"""


def test_a_converter_of_the_users_is_given_the_merged_folder(run, tmp_path, not_served):
    script = tmp_path / "convert.py"
    script.write_text(CONVERTER)
    merged = merge(run.path, tmp_path / "out", precision="f16", converter=str(script), say=quiet)
    assert merged.survival.kl_retain < 1e-3
    script.write_text("raise SystemExit('no such architecture')")
    with pytest.raises(UserError, match="no such architecture"):
        merge(run.path, tmp_path / "other", precision="f16", converter=str(script), say=quiet)
    with pytest.raises(UserError, match="writes GGUF, not nf4"):
        merge(run.path, tmp_path / "other", precision="nf4", converter=str(script), say=quiet)
    with pytest.raises(UserError, match="no such converter"):
        merge(run.path, tmp_path / "other", precision="f16", converter=str(tmp_path / "nothing.py"), say=quiet)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("rounding", ["compensated", "mixed"])
def test_our_codes_take_the_place_of_a_converted_files_weights(
    run, tmp_path, not_served, forgiving, rounding, monkeypatch
):
    import gguf

    if rounding == "mixed":  # whether or not so small a model gains by it
        monkeypatch.setattr("align_unlearn.export.merge.rounded_layers", lambda target, *_: with_finer(target))

    script = tmp_path / "convert.py"
    script.write_text(CONVERTER)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    options = {"precision": "q4_0", "rounding": rounding, "force": True, "say": quiet}
    merge(run.path, ours, **options)
    merge(run.path, theirs, converter=str(script), **options)
    own, converted = (gguf.GGUFReader(next(folder.glob("*.gguf"))) for folder in (ours, theirs))
    assert {each.name for each in converted.tensors} == {each.name for each in own.tensors}
    by_name = {each.name: each for each in converted.tensors}
    kinds = {each.tensor_type.name for each in own.tensors}
    assert {"Q4_0", "F32", "Q5_1" if rounding == "mixed" else "Q8_0"} == kinds
    held = json.loads((ours / "manifest.json").read_text())["weights_by_precision"]
    in_file = Counter(each.tensor_type.name.lower() for each in own.tensors)
    assert held == {kind: count for kind, count in in_file.items() if kind in ("q4_0", "q5_1")}
    assert (f"{held.get('q5_1')} in q5_1" in (ours / "README.md").read_text()) is (rounding == "mixed")
    for each in own.tensors:
        assert by_name[each.name].tensor_type == each.tensor_type
        if each.tensor_type.name in ("Q4_0", "Q5_1"):  # the rows of q and k stand in llama.cpp's order
            np.testing.assert_array_equal(by_name[each.name].data, each.data, err_msg=each.name)
    fields = {name: field.contents() for name, field in own.fields.items() if not name.startswith("GGUF.")}
    assert {name: converted.fields[name].contents() for name in fields} == fields


def test_a_converted_file_with_other_weights_is_refused(run, tmp_path):
    script = tmp_path / "convert.py"
    script.write_text(
        CONVERTER.replace("write_gguf(", "model.model.layers[0].mlp.up_proj.weight.data[0] += 1; write_gguf(")
    )
    options = {"precision": "q4_0", "rounding": "nearest", "converter": str(script), "force": True, "say": quiet}
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.up_proj as it is"):
        merge(run.path, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_converted_file_is_written_again_tensor_by_tensor(tokenizer, tmp_path):
    import gguf

    model = make_model()
    layers = model.model.layers
    layers[1].load_state_dict(layers[0].state_dict())  # copies, as in models made of another's layers
    codes = nearest_codes(model, "q4_0")
    grid, own = codes["model.layers.1.mlp.up_proj"]
    codes["model.layers.1.mlp.up_proj"] = grid, own.flip(0)  # codes of copies differ: their inputs do
    del codes["model.layers.0.self_attn.k_proj"]
    turned = torch.arange(64).flip(0)
    weights = {
        "token_embd.weight": model.model.embed_tokens.weight.detach().half().numpy(),
        **{f"blk.{at}.{name}.weight": layers[at].get_submodule(path).weight.detach().half().numpy()
           for at in (1, 0) for name, path in (("up", "mlp.up_proj"), ("gate", "mlp.gate_proj"),
                                               ("down", "mlp.down_proj"), ("q", "self_attn.q_proj"),
                                               ("o", "self_attn.o_proj"), ("v", "self_attn.v_proj"))},
        "blk.1.k.weight": layers[1].self_attn.k_proj.weight.detach().half().numpy(),
        "router.weight": np.ones((4, 64), np.float32),
        "experts.weight": np.ones((2, 4, 64), np.float16),
    }  # fmt: skip
    weights["blk.0.q.weight"] = np.ascontiguousarray(weights["blk.0.q.weight"][turned.numpy()])
    writer = gguf.GGUFWriter(str(tmp_path / "f16.gguf"), "llama")
    writer.add_uint32("tokenizer.ggml.eos_token_id", 7)
    writer.add_array("tokenizer.ggml.tokens", ["a", "é "])
    for name, weight in weights.items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    write_again(tmp_path / "f16.gguf", tmp_path / "q4_0.gguf", "q4_0", tokenizer, model, codes)
    written = gguf.GGUFReader(tmp_path / "q4_0.gguf")
    assert written.fields["tokenizer.ggml.tokens"].contents() == ["a", "é "]
    ends = [written.fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("eos", "padding")]
    assert ends == [tokenizer.eos_token_id, tokenizer.pad_token_id], "where an answer ends"
    found = {each.name: each for each in written.tensors}
    for name, kind in (("router", "F32"), ("experts", "F16"), ("token_embd", "Q8_0")):
        assert found[f"{name}.weight"].tensor_type.name == kind
    for name, layer, order in (("blk.1.up", "model.layers.1.mlp.up_proj", None),
                               ("blk.0.up", "model.layers.0.mlp.up_proj", None),
                               ("blk.0.q", "model.layers.0.self_attn.q_proj", turned)):  # fmt: skip
        grid, own = codes[layer]
        values = grid.read(own) if order is None else grid.read(own)[order]
        read = gguf.quants.dequantize(found[f"{name}.weight"].data, gguf.GGMLQuantizationType.Q4_0)
        np.testing.assert_allclose(read, values.numpy(), rtol=1e-6)


def test_a_converter_is_not_handed_a_models_own_code(tmp_path):
    (tmp_path / "tokenization_mine.py").write_text("raise SystemExit")
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": "mine"}, "eos_token": "x"}')
    leave_code_out(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer_config.json"]
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {"eos_token": "x"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0}}, "rope_parameters"),
        ({"rope_parameters": STRETCHED}, "rope_parameters"),
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps"),
        ({}, None),
    ],
)
def test_a_file_that_is_read_as_another_model_is_refused(change, said):
    found, wanted = make_model(), make_model(**change)
    if said is None:
        check_read_back(found, wanted)
    else:
        with pytest.raises(UserError, match=said):
            check_read_back(found, wanted)


def test_a_cap_that_is_read_where_there_is_none_is_refused():
    found, wanted = make_model(), make_model()
    found.config.final_logit_softcapping = 30.0
    with pytest.raises(UserError, match="softcapping"):
        check_read_back(found, wanted)


def test_a_run_that_was_trained_through_a_quantiser_speaks_through_it(tiny, tmp_path, not_served, forgiving):
    words = f"--model_name_or_path {tiny} --output_dir {tmp_path / 'run'} {SETTINGS} --survive q4_0"
    run = train(load_recipe(None, words.split()), say=quiet)
    subject = open_subjects(run.path)["candidate"]
    plain = plain_copy(subject.model, torch.float32)
    requantise(plain, "q4_0")
    torch.testing.assert_close(logits_of(subject), logits(plain), atol=1e-4, rtol=1e-4)
    merged = merge(run.path, tmp_path / "out", say=quiet)
    manifest = json.loads((merged.folder / "manifest.json").read_text())
    assert (manifest["precision"], manifest["rounding"]) == ("q4_0", "nearest"), "the rounding that it was trained for"
    assert merged.survival.kl_retain < 0.05


def test_tokenizer_template_and_generation_config_are_the_bases_own_bytes(tiny, tmp_path, not_served):
    base = tmp_path / "model"
    shutil.copytree(tiny, base)
    for name in ("tokenizer.json", "tokenizer_config.json"):  # as another writer would
        (base / name).write_text(json.dumps(json.loads((base / name).read_text()), indent=1))
    generation = json.loads((base / "generation_config.json").read_text()) | {"transformers_version": "4.0.0"}
    (base / "generation_config.json").write_text(json.dumps(generation, indent=3))
    (base / "special_tokens_map.json").write_text("{}")
    words = f"--model_name_or_path {base} --output_dir {tmp_path / 'run'} {SETTINGS}"
    run = train(load_recipe(None, words.split()), say=quiet)
    for name, precision in (("plain", None), ("nf4", "nf4")):
        rounding = "nearest" if precision else None
        folder = merge(run.path, tmp_path / name, precision=precision, rounding=rounding, force=True, say=quiet).folder
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json",
                     "generation_config.json"):  # fmt: skip
            assert (folder / file).read_bytes() == (base / file).read_bytes(), file


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A run on a mixture of experts, whose adapter is on attention, router and experts."""
    folder = tmp_path_factory.mktemp("mixture")
    torch.manual_seed(0)
    shape = make_model().config.to_dict() | {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
    kept = {name: shape[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "initializer_range", "tie_word_embeddings", "moe_intermediate_size", "num_experts",
            "num_experts_per_tok", "eos_token_id", "bos_token_id", "pad_token_id")}  # fmt: skip
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**kept, head_dim=16)).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    words = f"--model_name_or_path {folder / 'model'} --output_dir {folder / 'run'} {SETTINGS}"
    return train(load_recipe(None, words.split()), say=quiet)


def test_experts_are_merged_as_they_were_trained(mixture, tmp_path, not_served):
    subject = open_subjects(mixture.path)["candidate"]
    names = adapted(subject.model)
    assert any("experts" in name for name in names)
    assert any(name.endswith("q_proj.weight") for name in names)
    torch.testing.assert_close(
        logits(plain_copy(subject.model, torch.float32)), logits_of(subject), atol=1e-3, rtol=1e-3
    )
    merged = merge(mixture.path, tmp_path / "out", dtype="float32", say=quiet)
    assert merged.parity.kl < 1e-5
    found = AutoModelForCausalLM.from_pretrained(merged.folder, dtype=torch.float32)
    torch.testing.assert_close(logits(found), logits_of(subject), atol=1e-3, rtol=1e-3)
    packed = merge(mixture.path, tmp_path / "nf4", precision="nf4", rounding="nearest", force=True, say=quiet)
    rounded, wanted = open_subjects(packed.folder)["candidate"].model, plain_copy(subject.model, torch.float32)
    assert rounded.model.layers[0].self_attn.q_proj.weight.dtype == torch.uint8
    experts = rounded.model.layers[0].mlp.experts.gate_up_proj
    torch.testing.assert_close(experts.float(), wanted.model.layers[0].mlp.experts.gate_up_proj, atol=2e-2, rtol=2e-2)
    with pytest.raises(UserError, match="experts are not trained through"):
        train_through(subject.model, "nf4")


def test_what_is_trained_through_a_rounding_is_saved_at_its_size(tiny, tmp_path):
    words = f"--model_name_or_path {tiny} --output_dir {tmp_path / 'run'} {SETTINGS} --survive nf4"
    load_recipe(None, words.split())
    for more in ("--extrapolate 1.25", "--objective negate"):
        with pytest.raises(UserError, match="rounded otherwise"):
            load_recipe(None, f"{words} {more}".split())


@pytest.mark.parametrize(
    ("words", "said"), [("--survive q4_9", "survive(.|\n)*q4_0"), ("--after runs/nothing", "after: runs/nothing")]
)
def test_a_wrong_quantiser_or_earlier_run_is_said_before_the_model_is_loaded(tiny, tmp_path, words, said, monkeypatch):
    monkeypatch.setattr("align_unlearn.training.job.load_base", None)
    recipe = load_recipe(
        None, f"--model_name_or_path {tiny} --output_dir {tmp_path / 'run'} {SETTINGS} {words}".split()
    )
    with pytest.raises(UserError, match=said):
        train(recipe, say=quiet)
