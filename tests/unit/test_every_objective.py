"""Every objective by its name, from a recipe to an adapter, on the tiny model; and what is refused before that."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from align_unlearn.config import BaseModelConfig
from align_unlearn.data.examples import read_examples
from align_unlearn.errors import UserError
from align_unlearn.export.merge import merge
from align_unlearn.export.serving_check import Served
from align_unlearn.modeling.load import load_base
from align_unlearn.objectives.table import FORGET, PREFERENCE
from align_unlearn.training.alternatives import write_alternatives
from align_unlearn.training.job import train
from align_unlearn.training.recipe import load_recipe

FORGET_ROWS = [{"prompt": [{"role": "user", "content": f"Who is number {n}?"}], "chosen": "Somebody else, I think.",
                "rejected": f"Number {n} is {'salt ' * (n % 3)}."} for n in range(6)]  # fmt: skip
RETAIN_ROWS = [{"question": f"What is fact {n}?", "answer": f"It is {'sand ' * (n % 3)}{n}."} for n in range(6)]


@pytest.fixture
def words(tiny, tmp_path):
    for name, rows in (("forget", FORGET_ROWS), ("retain", RETAIN_ROWS)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def recipe(objective, **settings):
        given = {
            "objective": objective,
            "model_name_or_path": tiny,
            "load_in_4bit": "false",
            "forget_dataset": tmp_path / "forget.jsonl",
            "retain_dataset": tmp_path / "retain.jsonl",
            "output_dir": tmp_path / "run",
            "max_steps": 2,
            "max_length": 256,
            "per_device_train_batch_size": 3,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "disable_tqdm": "true",
            **settings,
        }
        return load_recipe(None, [str(word) for key, value in given.items() for word in (f"--{key}", value)])

    return recipe


@pytest.mark.parametrize("objective", [*FORGET, *PREFERENCE])
def test_from_recipe_to_adapter(objective, words):
    settings = {"retain_epsilon": 3.0} if objective == "pdu" else {}
    run = train(words(objective, max_steps=1, **settings), say=lambda line: None)
    weights = load_file(run.adapter / "adapter_model.safetensors")
    moved = [weight for name, weight in weights.items() if "lora_B" in name and weight.abs().sum() > 0]
    assert moved
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    log = [json.loads(line) for line in run.log_path.read_text().splitlines()]
    retain = run.manifest()["retain"]
    assert retain == (FORGET[objective].retain if objective in FORGET else "kl")
    assert any("retain_loss" in line for line in log) == (retain != "none")


def test_negate_is_the_base_minus_what_was_learned(words, tiny, tmp_path):
    """The adapter that was taught the forget rows lowers their NLL; subtracted, it raises it."""
    run = train(words("negate", max_steps=8), say=lambda line: None)
    base = load_base(BaseModelConfig(model_name_or_path=str(tiny), load_in_4bit=False))
    model = PeftModel.from_pretrained(base, str(run.adapter)).eval()
    from align_unlearn.data.batches import pad_rows
    from align_unlearn.modeling.tokenizer import load_tokenizer
    from align_unlearn.objectives.view import CompletionView
    from align_unlearn.training.unlearn import tokenised

    rows = list(tokenised(str(tmp_path / "forget.jsonl"), load_tokenizer(str(tiny)), 256))

    @torch.no_grad()
    def nll():
        return float(-CompletionView(model, **pad_rows(rows, 1)).logps.sum())

    subtracted = nll()
    with model.disable_adapter():
        before = nll()
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.scaling = {name: -value for name, value in module.scaling.items()}
    learned = nll()
    assert learned < before < subtracted


def test_extrapolation_multiplies_the_saved_update(words, tmp_path):
    once = load_file(train(words("npo"), say=lambda line: None).adapter / "adapter_model.safetensors")
    further = words("npo", extrapolate=1.5, output_dir=tmp_path / "further")
    more = load_file(train(further, say=lambda line: None).adapter / "adapter_model.safetensors")
    for name, weight in once.items():
        torch.testing.assert_close(more[name], weight * (1.5 if "lora_B" in name else 1.0))


def test_merging_at_a_scale_is_a_step_along_the_update(words, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("align_unlearn.export.merge.check_serving", lambda *args, **options: Served(0, 1.0, 1.0))
    run = train(words("npo"), say=lambda line: None)
    plain = load_file(next(tiny.glob("*.safetensors")))
    found = {}
    for scale in (0.0, 0.5, 1.0):
        folder = merge(run.path, tmp_path / f"at-{scale}", scale=scale, force=True, say=lambda line: None).folder
        found[scale] = load_file(next(folder.glob("*.safetensors")))
        assert json.loads((folder / "manifest.json").read_text())["scale"] == scale
    for name, weight in plain.items():
        torch.testing.assert_close(found[0.0][name], weight)
        torch.testing.assert_close(found[0.5][name] * 2, found[1.0][name] + weight, atol=1e-6, rtol=1e-5)


def test_alternatives_are_preference_rows_and_their_own_cache(tiny, tmp_path):
    source = tmp_path / "facts.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in RETAIN_ROWS))
    config = BaseModelConfig(model_name_or_path=str(tiny), load_in_4bit=False)
    said = []
    common = {"per_row": 8, "max_new_tokens": 100, "temperature": 2.0, "say": said.append}
    file = write_alternatives(str(source), tmp_path / "alternatives.jsonl", config, **common)
    rows = read_examples(str(file))
    assert 1 <= len(rows) <= 48
    assert f"{48 - len(rows)} left out" in said[-1]
    assert {row.completion for row in rows} <= {row["answer"] for row in RETAIN_ROWS}
    assert all(row.chosen and row.chosen != row.completion for row in rows)
    content = file.read_bytes()
    write_alternatives(str(source), file, config, **common)
    assert "already" in said[-1]
    assert file.read_bytes() == content
    with pytest.raises(UserError, match="something else"):
        write_alternatives(str(source), file, config, seed=1, **common)


def test_what_does_not_fit_is_refused_before_weights_are_loaded(words, tmp_path, monkeypatch):
    import align_unlearn.training.job as job

    monkeypatch.setattr(job, "load_base", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    with pytest.raises(UserError, match="2 layers"):
        train(words("rmu", objective_kwargs='{"layer": 9}'))
    with pytest.raises(UserError, match="retain_epsilon"):
        words("pdu")
    with pytest.raises(UserError, match="alternatives"):
        train(words("altpo", forget_dataset=tmp_path / "retain.jsonl", retain="none"))
    with pytest.raises(UserError, match="delta"):
        words("simnpo", objective_kwargs='{"dleta": 1}')
    with pytest.raises(UserError, match="within a batch"):
        words("kto", per_device_train_batch_size=1)
    for key, value in (("max_drift", 0.1), ("gradient_surgery", "true"), ("cache_ref_hidden", "true")):
        with pytest.raises(UserError, match=f"{key} would have no effect"):
            words("undial", **{key: value})
    with pytest.raises(UserError, match="max_drift_opening would have no effect"):
        words("simnpo", max_drift_opening=0.1)
    with pytest.raises(UserError, match="plain LoRA"):
        words("negate", use_dora="true")
    with pytest.raises(UserError, match="above 0"):
        words("npo", beta=0)
    with pytest.raises(UserError, match="mapping"):
        words("rmu", objective_kwargs="[1]")
    assert words("pdu", retain_epsilon=2, retain_coef=0).args.retain_coef == 0


def test_kto_estimates_its_reference_point_with_other_prompts(words):
    from align_unlearn.training.kto import mismatched

    rows = [
        {"prompt_ids": [prompt], "completion_ids": [10 * prompt + kind], "label": bool(kind)}
        for prompt in (1, 1, 2)
        for kind in (1, 0)
    ]
    assert [mismatched(rows, at) for at in range(6)] == [[21], [20], [21], [20], [11], [10]]
    with pytest.raises(UserError, match="two prompts"):
        mismatched(rows[:4], 0)


def test_a_run_killed_after_its_last_step_is_not_trained_past_it(words, monkeypatch):
    import align_unlearn.training.job as job

    def killed(*args):
        raise KeyboardInterrupt

    recipe = words("npo", max_steps=3, save_steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(job, "save_adapter", killed)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, say=lambda line: None)
    resumed = train(words("npo", max_steps=3, save_steps=1), say=lambda line: None)
    assert resumed.manifest()["steps"] == 3
    whole = train(words("npo", max_steps=3, save_steps=1, output_dir=f"{resumed.path}-2"), say=lambda line: None)
    for name, weight in load_file(whole.adapter / "adapter_model.safetensors").items():
        torch.testing.assert_close(load_file(resumed.adapter / "adapter_model.safetensors")[name], weight)
