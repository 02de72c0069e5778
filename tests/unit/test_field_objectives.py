"""Every objective of the table against its formula, computed independently from full logits in float64."""

import math

import pytest
import torch
from conftest import make_model
from peft import LoraConfig, get_peft_model

from align_unlearn.data.batches import pad_rows
from align_unlearn.errors import UserError
from align_unlearn.modeling.forward import layer_of_depth
from align_unlearn.objectives import forget
from align_unlearn.objectives.table import FORGET, RETAIN, bind_retain
from align_unlearn.objectives.view import CompletionView

EOS = 1
FORGET_ROWS = [([5, 6, 7], [20, 21, 22, EOS]), ([9, 8], [30, EOS])]
CHOSEN_ROWS = [([5, 6, 7], [40, EOS]), ([9, 8], [41, 42, EOS])]


@pytest.fixture(scope="module")
def policy():
    model = get_peft_model(make_model(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return model.double().eval()


def batch(rows):
    """Padded with the EOS token, so that a mask made from token values would drop the true ones."""
    return pad_rows([{"input_ids": p + c, "labels": [-100] * len(p) + c} for p, c in rows], EOS)


def view(policy):
    return CompletionView(policy, **batch(FORGET_ROWS), chosen=CompletionView(policy, **batch(CHOSEN_ROWS)))


def rows_of(policy, rows, original=False):
    """(logits (n, V), labels (n,)) of each row's completion, each computed on its own, without padding."""
    found = []
    for prompt, completion in rows:
        ids = torch.tensor([prompt + completion])
        if original:
            with torch.no_grad(), policy.disable_adapter():
                z = policy(ids).logits
        else:
            z = policy(ids).logits
        found.append((z[0, len(prompt) - 1 : -1], torch.tensor(completion)))
    return found


def logps_of(policy, rows, original=False):
    return [z.log_softmax(-1)[range(len(y)), y] for z, y in rows_of(policy, rows, original)]


def expected(name, policy):
    own, ref = rows_of(policy, FORGET_ROWS), rows_of(policy, FORGET_ROWS, original=True)
    logps, ref_logps = logps_of(policy, FORGET_ROWS), logps_of(policy, FORGET_ROWS, original=True)
    chosen, ref_chosen = logps_of(policy, CHOSEN_ROWS), logps_of(policy, CHOSEN_ROWS, original=True)

    def sigma(x):
        return 1 / (1 + torch.exp(-x))

    def row(at):
        z, y = own[at]
        lp, count = logps[at], len(logps[at])
        p = lp.exp()
        if name in ("ga", "graddiff", "kl_min"):
            return lp.sum() / count
        if name == "npo":
            return -20 * torch.log(sigma(-0.1 * (lp.sum() - ref_logps[at].sum())))
        if name == "simnpo":
            return -2 / 4.5 * torch.log(sigma(4.5 * (-lp.sum() / count)))
        if name == "wga":
            return sum(w * each for w, each in zip(p.detach(), lp, strict=True)) / count
        if name == "satimp":
            return sum(w**5 * (1 - w) * each for w, each in zip(p.detach(), lp, strict=True)) / count
        if name == "undial":
            target = ref[at][0].clone()
            target[range(count), y] -= 10
            return -(target.softmax(-1) * z.log_softmax(-1)).sum() / count
        if name == "ceu":
            terms = []
            for t in range(1, count):
                target = z[t].detach().exp()
                target[y[t]] = 0
                terms.append(-(target / target.sum() * z[t].log_softmax(-1)).sum())
            return sum(terms) / len(terms)
        if name == "pdu":
            return sum((each.max() - each.mean()) ** 2 for each in z) / count
        if name == "ihl":
            q = z.softmax(-1)
            tops = [q[t][[v for v in range(q.shape[1]) if v != y[t]]].max() for t in range(count)]
            return sum(1 + q[t, y[t]] - tops[t] for t in range(count)) / count
        if name == "flat":
            return torch.exp(p.mean() - 1) - chosen[at].exp().mean()
        if name == "jensun":
            terms = []
            for each in chosen[at].exp():
                m = (1 + each) / 2
                rest = 1 - each  # all other tokens: their middle is half of them
                terms.append(0.5 * -torch.log(m) + 0.5 * (each * torch.log(each / m) + rest * math.log(2)))
            return sum(terms) / len(terms)
        if name in ("idk", "altpo"):
            margin = (chosen[at] - ref_chosen[at]).sum() - (lp - ref_logps[at]).sum()
            return -20 * torch.log(sigma(0.1 * margin))
        if name == "negate":
            return -lp.sum() / count
        raise AssertionError(f"no formula is written down for {name}")

    return torch.stack([row(at) for at in range(len(own))])


def gradients(policy, loss):
    policy.zero_grad()
    loss.sum().backward()
    return {name: each.grad.clone() for name, each in policy.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("name", [each for each in FORGET if each != "rmu"])
def test_value_and_gradient(name, policy):
    ours, theirs = FORGET[name].loss(view(policy)), expected(name, policy)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    mine, independent = gradients(policy, ours), gradients(policy, theirs)
    assert mine.keys() == independent.keys()
    for parameter, grad in independent.items():
        torch.testing.assert_close(mine[parameter], grad, rtol=1e-5, atol=1e-9)


def layer_outputs(policy, rows, layer, original=False):
    """Hidden states of the completion's predicting positions, from transformers' own `output_hidden_states`."""
    found = []
    for prompt, completion in rows:
        ids = torch.tensor([prompt + completion])
        if original:
            with torch.no_grad(), policy.disable_adapter():
                states = policy(ids, output_hidden_states=True).hidden_states
        else:
            states = policy(ids, output_hidden_states=True).hidden_states
        found.append(states[layer + 1][0, len(prompt) - 1 : -1])
    return found


def test_rmu_and_its_retain_term(policy):
    u = torch.rand(64, generator=torch.Generator().manual_seed(0)).double()
    u /= u.norm()
    ours = forget.rmu(view(policy), layer=0, c=3.0)
    theirs = torch.stack([((h - 3 * u) ** 2).mean() for h in layer_outputs(policy, FORGET_ROWS, 0)])
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    mine, independent = gradients(policy, ours), gradients(policy, theirs)
    assert mine.keys() == independent.keys()
    assert not any("layers.1" in name for name in mine), "what lies above the layer is not computed"
    for parameter, grad in independent.items():
        torch.testing.assert_close(mine[parameter], grad, rtol=1e-5, atol=1e-9)
    held = bind_retain("hidden", {"layer": 0, "c": 3.0})(view(policy))
    before = layer_outputs(policy, FORGET_ROWS, 0, original=True)
    after = layer_outputs(policy, FORGET_ROWS, 0)
    naive = torch.stack([((h - r) ** 2).mean() for h, r in zip(after, before, strict=True)])
    torch.testing.assert_close(held, naive, rtol=1e-6, atol=1e-9)


def naive_retain(name, policy):
    rows = []
    originals = rows_of(policy, FORGET_ROWS, original=True)
    for (z, y), (r, _) in zip(rows_of(policy, FORGET_ROWS), originals, strict=True):
        p, q = z.softmax(-1), r.softmax(-1)
        m = (p + q) / 2
        kl = (q * (q / p).log()).sum() / len(y)
        nll = -p[range(len(y)), y].log().mean()
        js = ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2 / len(y)
        rows.append({"kl": kl, "nll": nll, "js": js, "kl+nll": kl + nll}[name])
    return torch.stack(rows)


@pytest.mark.parametrize("name", ["kl", "nll", "js", "kl+nll"])
def test_retain_terms(name, policy):
    ours, theirs = RETAIN[name](view(policy)), naive_retain(name, policy)
    assert ours.min() > 0
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    mine, independent = gradients(policy, ours), gradients(policy, theirs)
    for parameter, grad in independent.items():
        torch.testing.assert_close(mine[parameter], grad, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("divergence", forget.F_DIVERGENCES)
def test_flat_conjugates_are_those_of_their_divergence(divergence):
    """f*(u) = sup over x of (u x − f(x)), found on a grid."""
    f = {
        "kl": lambda x: x * torch.log(x),
        "total_variation": lambda x: (x - 1).abs() / 2,
        "jensen_shannon": lambda x: -(x + 1) * torch.log((1 + x) / 2) + x * torch.log(x),
        "pearson": lambda x: (x - 1) ** 2,
    }[divergence]
    activation, conjugate = forget.F_DIVERGENCES[divergence]
    grid = torch.linspace(1e-6, 30, 3_000_001, dtype=torch.float64)
    for v in (0.05, 0.4, 0.95):
        u = activation(torch.tensor(v, dtype=torch.float64))
        torch.testing.assert_close(conjugate(u), (u * grid - f(grid)).max(), atol=1e-5, rtol=0)


def test_flat_names_the_nearest_divergence(policy):
    with pytest.raises(UserError, match="pearson"):
        forget.flat(view(policy), divergence="pearsen")


def test_objectives_on_preference_rows_say_so(policy):
    for name, entry in FORGET.items():
        plain = CompletionView(policy, **batch(FORGET_ROWS))
        if entry.chosen:
            with pytest.raises(UserError, match="chosen answer"):
                entry.loss(plain)
        else:
            assert entry.loss(plain).shape == (2,), name


def test_layers_by_index_fraction_and_name():
    assert layer_of_depth(32, 7) == 7
    assert layer_of_depth(32, "7") == 7
    assert layer_of_depth(32, 0.25) == 8
    assert layer_of_depth(32, "model.layers.7") == 7
    for wrong in (32, -1, 1.5, "model.layers.99", "model.norm", -0.5):
        with pytest.raises(UserError, match="32 layers"):
            layer_of_depth(32, wrong)
