"""A tiny random Llama with a real tokenizer, made here: what every unit test runs on."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a tiny model is faster on one thread, subprocesses included

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from align_unlearn.data.sources import CORPUS
from align_unlearn.modeling.tokenizer import repair

ROOT = Path(__file__).parents[1]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer():
    """A byte-level BPE of 600 tokens, trained on the shipped corpus; its pad token is its EOS token, as SmolLM2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(CORPUS / "refusals.txt"), str(CORPUS / "book_forget.txt")], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", bos_token="<|im_start|>")
    fast.chat_template = CHAT_TEMPLATE
    return repair(fast)


def make_model(seed: int = 0, **changes) -> LlamaForCausalLM:
    """Two layers of width 64: enough for everything to be of the right kind."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 600,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))


def run_script(*words) -> subprocess.CompletedProcess:
    """`python WORDS`, from the root of the repository and in this process: torch is not imported again for each."""
    argv, out, err = [str(word) for word in words], io.StringIO(), io.StringIO()
    start, named = runpy.run_path, argv[0]
    if argv[0] == "-m":
        start, named, argv = runpy.run_module, argv[1], argv[1:]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", argv)
        patch.chdir(ROOT)
        code: object = 0
        try:
            start(named, run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
    if isinstance(code, str):  # as the interpreter takes it
        print(code, file=err)
        code = 1
    return subprocess.CompletedProcess(argv, code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def model():
    return make_model()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """The tiny model as a folder, as a user would name it."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """No test reads or fills the user's cache."""
    monkeypatch.setenv("ALIGN_UNLEARN_CACHE", str(tmp_path / "cache"))
