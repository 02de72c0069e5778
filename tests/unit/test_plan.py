"""`plan` against what really happens: tensors that autograd keeps, passes that are made, bytes that are held."""

import json

import pytest
import torch
from conftest import make_model
from test_every_objective import words  # noqa: F401 (a fixture)
from typer.testing import CliRunner

import align_unlearn.objectives.view as view_module
from align_unlearn.cli import app
from align_unlearn.config import BaseModelConfig
from align_unlearn.data.examples import read_examples
from align_unlearn.data.tokens import tokenise
from align_unlearn.modeling.load import load_base
from align_unlearn.modeling.tokenizer import load_tokenizer
from align_unlearn.training import job as job_module
from align_unlearn.training.job import build_trainer, retain_term
from align_unlearn.training.plan import MEMORY, batch_shapes, forwards, held_bytes, plan, saved_bytes, with_adapter
from align_unlearn.training.recipe import load_recipe
from align_unlearn.training.rows import read_job_data


def test_activations_without_storage_are_those_with_it(tiny):
    config = BaseModelConfig(model_name_or_path=str(tiny), load_in_4bit=False, lora_r=4)
    with torch.device("meta"):
        meta = with_adapter(make_model(), config)
    real = with_adapter(make_model(), config)
    own = {each.untyped_storage().data_ptr() for each in [*real.parameters(), *real.buffers()]}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    mask = torch.ones(3, 1, 17, 17, dtype=torch.bool)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        real.get_base_model().base_model(input_ids=torch.zeros(3, 17, dtype=torch.long), attention_mask=mask)
    # the attention kernel without storage keeps a little more than the one that runs on a CPU
    assert saved_bytes(meta, 3, 17) == pytest.approx(sum(each.nbytes() for each in kept.values()), rel=0.05)
    assert saved_bytes(meta, 6, 17) > 1.9 * saved_bytes(meta, 3, 17)


def test_weights_are_those_that_are_held(tiny):
    for settings in ({"load_in_4bit": True}, {"load_in_4bit": False}):
        config = BaseModelConfig(model_name_or_path=str(tiny), **settings)
        model = load_base(config)
        held = sum(each.numel() * each.element_size() for each in model.parameters())
        for module in model.modules():
            state = getattr(getattr(module, "weight", None), "quant_state", None)
            held += 0 if state is None else state.absmax.numel() * state.absmax.element_size()
        with torch.device("meta"):
            counted = held_bytes(make_model(), config)
        assert counted.weights == pytest.approx(held, rel=0.01)
        linear = [each.weight.numel() for name, each in make_model().named_modules() if hasattr(each, "in_features")]
        in_layers = sum(linear) - make_model().lm_head.weight.numel()
        assert counted.dequantised == (4 * in_layers if settings["load_in_4bit"] else 0)
        assert (counted.largest > 0) == settings["load_in_4bit"]


@pytest.mark.parametrize(
    ("objective", "settings"),
    [
        ("npo", {}),
        ("npo", {"cache_ref_hidden": "true"}),
        ("npo", {"precompute_ref_log_probs": "false"}),
        ("simnpo", {}),
        ("undial", {}),
        ("flat", {"retain": "kl+nll"}),
        ("jensun", {}),
        ("idk", {"retain": "kl"}),
        ("rmu", {}),
        ("ga", {}),
    ],
)
def test_forwards_are_those_of_a_step(objective, settings, words, tiny, tokenizer, monkeypatch):  # noqa: F811
    recipe = words(objective, **{"max_steps": 1, **settings})
    data = read_job_data(recipe.job, tokenizer, retain_term=retain_term(recipe) != "none")
    trainer = build_trainer(recipe, data, load_base(recipe.model), tokenizer)
    calls = {True: 0, False: 0}

    def counting(real):
        def counted(*args):
            calls[torch.is_grad_enabled()] += 1
            return real(*args)

        return counted

    for name in ("hidden_states", "layer_states"):
        monkeypatch.setattr(view_module, name, counting(getattr(view_module, name)))
    trainer.train()
    assert (calls[True], calls[False]) == forwards(recipe)


def test_no_weights_are_loaded(words, tiny, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(job_module, "load_base", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    found = plan(words("npo"))
    assert found.holes > 0
    assert found.total == sum(getattr(found, name) for name in MEMORY)
    assert found.parameters == sum(each.numel() for each in make_model().parameters())
    larger = plan(words("npo", per_device_train_batch_size=6))
    assert 1.9 < larger.activations / found.activations < 2.1
    assert plan(words("npo", cache_ref_hidden="true")).cache_bytes > found.cache_bytes
    words("npo").write(tmp_path / "recipe.yaml")
    printed = CliRunner().invoke(app, ["plan", str(tmp_path / "recipe.yaml")])
    assert printed.exit_code == 0, printed.output
    assert "peak memory" in printed.output


def test_an_online_run_asks_and_holds_what_its_rewards_and_sets_name(tiny, tmp_path):
    for name, length in (("forget", 3), ("near", 4), ("kept", 40)):
        row = {"question": " ".join(["word"] * length), "answer": "It is so."}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")

    def shapes(*more):
        sets = f"--forget_dataset {tmp_path}/forget.jsonl --neighbour_dataset {tmp_path}/near.jsonl"
        sets += f" --retain_dataset {tmp_path}/kept.jsonl --objective rloo --output_dir {tmp_path}/run --use_cpu true"
        return batch_shapes(load_recipe(None, [*sets.split(), "--model_name_or_path", str(tiny), *more]))

    rewards = {"refusal": {"rows": ["forget"]}}
    (example,) = read_examples([{"question": "?", "answer": "It is so."}])
    answer = len(tokenise(load_tokenizer(str(tiny)), example, max_length=None).completion_ids)
    plain = shapes("--rewards", json.dumps(rewards))
    asked = shapes("--rewards", json.dumps(rewards | {"answer": {"model": "refusal", "rows": ["retain"]}}))
    free = shapes("--rewards", json.dumps(rewards), "--retain", "none")
    assert asked.micro_batch[0][1] > plain.micro_batch[0][1], "retain prompts are asked where a reward names them"
    assert (len(plain.micro_batch), len(free.micro_batch)) == (2, 1)
    assert (plain.retain_positions, free.retain_positions) == (answer, 0)
