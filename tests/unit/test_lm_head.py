"""The chunked LM head against the naive computation: value and gradient, in float64 and bf16."""

import pytest
import torch
from conftest import make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import kl_div, log_softmax

from align_unlearn.errors import UserError
from align_unlearn.modeling.lm_head import LMHead, kl_divergence, token_logps


def random_head(vocabulary=37, width=8, dtype=torch.float64, bias=True, **kwargs):
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=dtype)
    return LMHead(weight, torch.randn(vocabulary, generator=generator, dtype=dtype) if bias else None, **kwargs)


def naive_logits(head, hidden):
    z = (hidden @ head.weight.T + (0 if head.bias is None else head.bias)) * head.scale
    return (head.softcap * torch.tanh(z / head.softcap) if head.softcap else z) / head.temperature


HEADS = [
    {},
    {"scale": 0.25},
    {"softcap": 3.0},
    {"scale": 2.0, "softcap": 1.5},
    {"bias": False},
    {"temperature": 0.7},
    {"softcap": 1.5, "temperature": 2.0},
]


@pytest.mark.parametrize("kwargs", HEADS)
@pytest.mark.parametrize("tile", [1, 4, 100])
def test_token_logps_equal_naive(kwargs, tile):
    head = random_head(**kwargs)
    hidden = torch.randn(11, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 37, (11,))
    upstream = torch.randn(11, dtype=torch.float64)

    ours = token_logps(hidden, labels, head, tile)
    (ours_grad,) = torch.autograd.grad((ours * upstream).sum(), hidden)
    naive = log_softmax(naive_logits(head, hidden), -1).gather(-1, labels[:, None])[:, 0]
    (naive_grad,) = torch.autograd.grad((naive * upstream).sum(), hidden)

    torch.testing.assert_close(ours, naive, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(ours_grad, naive_grad, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("kwargs", HEADS)
@pytest.mark.parametrize("tile", [1, 4, 100])
def test_kl_equals_naive(kwargs, tile):
    head = random_head(**kwargs)
    hidden = torch.randn(9, 8, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(9, 8, dtype=torch.float64)
    upstream = torch.randn(9, dtype=torch.float64)

    ours = kl_divergence(ref, hidden, head, tile)
    (ours_grad,) = torch.autograd.grad((ours * upstream).sum(), hidden)
    logp, ref_logp = (log_softmax(naive_logits(head, each), -1) for each in (hidden, ref))
    naive = kl_div(logp, ref_logp, log_target=True, reduction="none").sum(-1)
    (naive_grad,) = torch.autograd.grad((naive * upstream).sum(), hidden)

    torch.testing.assert_close(ours, naive, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(ours_grad, naive_grad, atol=1e-9, rtol=1e-9)


def test_finite_differences():
    head = random_head(softcap=2.0, scale=0.7)
    hidden = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(3, 8, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda h: kl_divergence(ref, h, head, 2), hidden)
    assert torch.autograd.gradcheck(lambda h: token_logps(h, torch.tensor([1, 5, 9]), head, 2), hidden)


def test_bf16_is_close_to_float64():
    head = random_head(vocabulary=512, width=64)
    hidden = torch.randn(33, 64, dtype=torch.float64) / 8
    ref = hidden + torch.randn(33, 64, dtype=torch.float64) / 20
    half = LMHead(head.weight.bfloat16(), head.bias.bfloat16())
    rounded = LMHead(half.weight.double(), half.bias.double())
    exact = kl_divergence(ref.bfloat16().double(), hidden.bfloat16().double(), rounded)
    low = hidden.bfloat16().requires_grad_()
    ours = kl_divergence(ref.bfloat16(), low, half)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact, atol=2e-2, rtol=5e-2)
    ours.sum().backward()
    assert low.grad.dtype == torch.bfloat16
    assert torch.isfinite(low.grad).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 9), st.integers(0, 10_000))
def test_kl_is_zero_at_itself_and_never_negative(rows, tile, seed):
    generator = torch.Generator().manual_seed(seed)
    head = random_head()
    first, second = torch.randn(2, rows, 8, generator=generator, dtype=torch.float64)
    assert (kl_divergence(first, second, head, tile) >= -1e-12).all()
    assert kl_divergence(first, first, head, tile).abs().max() == 0


def test_no_positions_is_an_empty_result_that_has_a_gradient():
    hidden = torch.zeros(0, 8, dtype=torch.float64, requires_grad=True)
    token_logps(hidden, torch.zeros(0, dtype=torch.long), random_head()).sum().backward()
    assert hidden.grad.shape == (0, 8)


def test_head_of_a_model_gives_its_logits(model):
    ids = torch.arange(6)[None]
    head = LMHead.of(model)
    with torch.no_grad():
        hidden = model.base_model(ids).last_hidden_state[0]
        torch.testing.assert_close(head.logits(hidden), model(ids).logits[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("family", "settings_"),
    [
        ("Gemma2", {"final_logit_softcapping": 5.0, "head_dim": 16, "query_pre_attn_scalar": 16}),
        ("Cohere", {"logit_scale": 0.125}),
        ("Granite", {"logits_scaling": 4.0}),
    ],
)
def test_scaling_of_real_families(family, settings_):
    import transformers

    config = getattr(transformers, f"{family}Config")(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=0, **settings_,
    )  # fmt: skip
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        hidden = model.base_model(ids).last_hidden_state[0]
        torch.testing.assert_close(LMHead.of(model).logits(hidden), model(ids).logits[0].float(), rtol=1e-5, atol=1e-5)


def test_a_head_with_an_adapter_is_refused():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make_model(tie_word_embeddings=False), LoraConfig(target_modules=["lm_head"], r=2))
    with pytest.raises(UserError, match="LM head"):
        LMHead.of(model)


def test_memory_is_a_tile_not_all_logits():
    """Peak of live logits: with a tile of 8 positions of 4,000 the extra tensors stay far below (N, V)."""
    head = random_head(vocabulary=2000, width=16, dtype=torch.float32)
    hidden = torch.randn(4000, 16, requires_grad=True)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch():
        kl_divergence(hidden.detach(), hidden, head, 8).sum().backward()
    assert largest <= 4000 * 16
