# Two commands do all the set-up: `make demo` runs the main job, `make test` passes the tests.
PYTHON ?= python3
VENV   ?= .venv
TOFU   ?= locuslab/TOFU
REWARD_TRAIN ?= PKU-Alignment/BeaverTails@30k_train
REWARD_TEST  ?= PKU-Alignment/BeaverTails@30k_test
RUN    := $(VENV)/bin/
STAMP  := $(VENV)/.ready

.PHONY: demo demo-copyright demo-facts demo-hallucination demo-bias demo-toxicity demo-ppo demo-rloo demo-grpo reward-model compare-tofu bench-plan bench-steps bench-ppo bench-audits bench-survival bench-stacked test test-page unit lint clean help

help:
	@sed -n 's/^## //p' Makefile

## make demo            a model that complies with harmful requests learns to refuse: train, audit, merge, audit again
demo: $(STAMP)
	$(RUN)python recipes/dpo_refusals.py recipes/quickstart.yaml --if_exists overwrite

## make demo-copyright  a model that recites a book forgets it; a second book stays
demo-copyright: $(STAMP)
	$(RUN)python recipes/finetune.py recipes/copyright_teach.yaml
	$(RUN)python recipes/npo.py recipes/copyright.yaml --if_exists overwrite

## make demo-facts      facts about three people are forgotten, those about nine stay
demo-facts: $(STAMP)
	$(RUN)python recipes/finetune.py recipes/facts_teach.yaml
	$(RUN)python recipes/npo.py recipes/facts.yaml --if_exists overwrite

## make demo-hallucination  asked about things that do not exist, the model says that it does not know them
demo-hallucination: $(STAMP)
	$(RUN)python recipes/dpo_refusals.py recipes/hallucination.yaml --if_exists overwrite

## make demo-bias       which pronoun follows an occupation is evened out
demo-bias: $(STAMP)
	$(RUN)python recipes/npo.py recipes/bias.yaml --if_exists overwrite

## make demo-toxicity   a model that abuses people learns not to, under a cost with a limit
demo-toxicity: $(STAMP)
	$(RUN)python recipes/finetune.py recipes/toxicity_teach.yaml
	$(RUN)python recipes/online_rl.py recipes/toxicity.yaml --if_exists overwrite

## make reward-model    a harmlessness reward from judged responses (REWARD_TRAIN=, REWARD_TEST=: files, or from the hub)
reward-model: $(STAMP)
	$(RUN)python recipes/reward_model.py recipes/reward_model.yaml --train_dataset $(REWARD_TRAIN) --test_dataset $(REWARD_TEST)

runs/reward/adapter/reward.json:
	$(MAKE) reward-model

runs/harmless-start/adapter/adapter_model.safetensors: $(STAMP)
	$(RUN)align-unlearn train recipes/harmless_start.yaml

## make demo-ppo        PPO against that reward (made first, where there is none: hours on a CPU): requests are refused
demo-ppo: $(STAMP) runs/reward/adapter/reward.json runs/harmless-start/adapter/adapter_model.safetensors
	$(RUN)python recipes/online_rl.py recipes/ppo_harmless.yaml --if_exists overwrite

## make demo-rloo       the same with RLOO
demo-rloo: $(STAMP) runs/reward/adapter/reward.json runs/harmless-start/adapter/adapter_model.safetensors
	$(RUN)python recipes/online_rl.py recipes/rloo_harmless.yaml --if_exists overwrite

## make demo-grpo       GRPO against a leakage reward: a recited book is unlearned from the model's own completions
demo-grpo: $(STAMP)
	$(RUN)python recipes/finetune.py recipes/copyright_teach.yaml
	$(RUN)python recipes/online_rl.py recipes/grpo_leakage.yaml --if_exists overwrite

## make compare-tofu    every objective on a small TOFU world: which to choose (TOFU=folder of its files, or from the hub)
compare-tofu: $(STAMP)
	$(RUN)python benchmarks/compare_tofu.py --tofu $(TOFU)

## make bench-steps     what a step costs beside a supervised one, and what the kept states save
bench-steps: $(STAMP)
	$(RUN)python benchmarks/steps.py

## make bench-ppo       memory of PPO's four roles on one 4-bit base against four models
bench-ppo: $(STAMP) runs/reward/adapter/reward.json
	$(RUN)python benchmarks/ppo_memory.py

## make bench-plan      what `plan` foresees against the memory that runs take
bench-plan: $(STAMP)
	$(RUN)python benchmarks/plan.py

## make bench-audits    audits of models whose outcome is known, and what reading each text once saves
bench-audits: $(STAMP)
	$(RUN)python benchmarks/audits.py
	$(RUN)python benchmarks/audit_cost.py

## make bench-survival  what each way of shipping keeps of the forgetting, on the runs of demo and demo-copyright
bench-survival: $(STAMP)
	$(RUN)align-unlearn train recipes/quickstart.yaml --survive nf4 --extrapolate 1 --output_dir runs/quickstart-through-nf4
	$(RUN)align-unlearn train recipes/quickstart.yaml --survive q4_0 --extrapolate 1 --output_dir runs/quickstart-through-q4_0
	$(RUN)python benchmarks/survival.py quickstart runs/quickstart runs/quickstart-through-nf4 runs/quickstart-through-q4_0
	$(RUN)align-unlearn train recipes/copyright.yaml --survive nf4 --output_dir runs/copyright-through-nf4
	$(RUN)align-unlearn train recipes/copyright.yaml --survive q4_0 --output_dir runs/copyright-through-q4_0
	$(RUN)python benchmarks/survival.py copyright runs/copyright runs/copyright-through-nf4 runs/copyright-through-q4_0
	$(RUN)python benchmarks/streamed.py

## make bench-stacked   a second request on top of demo-copyright, merged with the first and without it
bench-stacked: $(STAMP)
	$(RUN)python benchmarks/stacked.py

## make test            linter, types, unit tests, every recipe on a tiny model
test: lint unit
	$(RUN)python -m pytest -n auto tests/recipes

## make test-page       the audit page in a real browser, with hostile text (needs chromium)
test-page: $(STAMP)
	$(RUN)python -m pytest -m browser tests/browser

## make unit            the unit tests alone
unit: $(STAMP)
	$(RUN)python -m pytest -n auto tests/unit

## make lint            ruff and mypy --strict
lint: $(STAMP)
	$(RUN)ruff check .
	$(RUN)ruff format --check .
	$(RUN)mypy

$(STAMP): pyproject.toml constraints.txt scripts/install.sh
	sh scripts/install.sh "$(PYTHON)" "$(VENV)"
	@touch $(STAMP)

## make clean           remove the environment and the runs
clean:
	rm -rf $(VENV) runs exports
