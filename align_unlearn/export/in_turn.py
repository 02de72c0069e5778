"""A model changed one decoder layer after the other, each knowing what those before it have lost.

Rounded on what the unrounded model shows them, layers keep what they make of inputs that they will never see, and what
is lost adds up along the depth: at the last layers it is ten times what one of them loses by itself, and half of it
could be told from the inputs that come (SmolLM2-135M in Q4_0). So each layer is shown both, what it was given and what
it is given once the decoder layers before its own have changed, and is asked for what the first led to, from the second
(GPTAQ, arXiv:2504.02692).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from align_unlearn.data.batches import pad_texts
from align_unlearn.errors import UserError
from align_unlearn.export.weighing import Weighed
from align_unlearn.modeling.forward import decoder_layers, hidden_states
from align_unlearn.modeling.generate import progress_bar
from align_unlearn.modeling.round_trip import linear_layers
from align_unlearn.modeling.rounding import DAMPING, damped

Inputs = dict[str, Tensor]
"""By linear layer, (rows, in)."""
Call = tuple[tuple[Any, ...], dict[str, Any]]
"""What a decoder layer is called with beside the hidden states."""
HELD_OUT = 4
"""Every so many batches one says how far the others' correction holds."""


@dataclass(frozen=True)
class Shown:
    """Sums over rows of what a linear layer is shown, x before anything was changed and q now, each with a weight m.

    Attributes:
        moments: (in, in) Σ m² q qᵀ.
        missing: (in, in) Σ m² (x − q) qᵀ.
    """

    moments: Tensor
    missing: Tensor

    @classmethod
    def nothing(cls, layer: nn.Linear) -> Shown:
        """Before the first row."""
        zeros = torch.zeros(layer.in_features, layer.in_features, device=layer.weight.device)
        return cls(zeros, zeros.clone())

    def add(self, before: Tensor, now: Tensor, weights: Tensor) -> None:
        """Takes in (rows, in) of x and q, and (rows,) weights."""
        known = now.float() * weights[:, None]
        self.moments.addmm_(known.T, known)
        if before is not now:
            self.missing.addmm_((before.float() * weights[:, None] - known).T, known)

    def __add__(self, other: Shown) -> Shown:
        return Shown(self.moments + other.moments, self.missing + other.missing)

    def correction(self, weight: Tensor, damping: float = DAMPING) -> Tensor:
        """(out, in), fp64, what is to be added to `weight` for it to make of q what it made of x: least squares.

        Args:
            weight: (out, in).
            damping: of the mean of the moments' diagonal: how firmly it stays as it is where q says little.
        """
        spread = damped(self.moments.double(), damping)
        missed = weight.double() @ self.missing.double()
        return torch.cholesky_solve(missed.T, torch.linalg.cholesky(spread)).T


@dataclass(frozen=True)
class Seen:
    """What a linear layer is shown.

    Attributes:
        told: by most of the texts.
        held: by those that were kept back.
    """

    told: Shown
    held: Shown

    @property
    def moments(self) -> Tensor:
        """(in, in) Σ m² q qᵀ over all texts."""
        return self.told.moments + self.held.moments

    def wanted(self, weight: Tensor) -> Tensor:
        """(out, in) the weight that makes of q what comes closest to what `weight` made of x, as far as that holds.

        Few texts have a correction of their own that holds for no others. So of the one that most texts ask for it is
        measured how much of it those kept back would take, and as much is taken of what all ask for.
        """
        if not self.told.missing.any():
            return weight
        found = self.told.correction(weight)
        asked = (weight.double() @ self.held.missing.double() * found).sum()
        done = (found @ self.held.moments.double() * found).sum()
        share = (asked / done).clamp(0, 1) if done > 0 else torch.zeros_like(asked)
        corrected: Tensor = weight + (share * (self.told + self.held).correction(weight)).to(weight.dtype)
        return corrected


@torch.no_grad()
def in_turn(model: Any, batches: Sequence[Weighed], changed: Callable[[str, Seen], Tensor | None], title: str) -> None:
    """Asks of every linear layer, from the first decoder layer to the last, what its weight is to be.

    A decoder layer's linear layers are asked together. Those outside of decoder layers, and all of a model that is more
    than one decoder layer after the other, are shown what they are given in the model as it is.

    Args:
        model: a plain model; left as it was.
        batches: texts with their weights, of this model.
        changed: of a layer's name and what it is shown, its new weight; none for the one that it has.
        title: for the progress bar.
    """
    layers = linear_layers(model)
    runs = _entered(model, batches)
    steps = [_Step(at, block, _within(block, layers)) for at, block in enumerate(_blocks(model) if runs else [])]
    alone = {name: layer for name, layer in layers.items() if not any(name in step.layers for step in steps)}
    with progress_bar() as progress:
        bar = progress.add_task(title, total=len(layers))
        for name, seen in (_as_it_is(model, batches, alone) if alone else {}).items():
            changed(name, seen)
            progress.advance(bar)
        for step in steps:
            shown = _shown(step, runs)
            with _put_back(step.layers):
                for name, seen in shown.items():
                    if (weight := changed(name, seen)) is not None:
                        layers[name].weight.copy_(weight)
                    progress.advance(bar)
                for run in runs:
                    run.now = step.through(run.now, run.calls_now)


@dataclass
class _Run:
    """A batch on its way through the decoder layers.

    Attributes:
        batch: the texts.
        calls: by decoder layer, as the model calls them.
        calls_now: the same for the changed model: what layers write for each other to read is not mixed up.
        before: hidden states in the model as it is.
        now: hidden states in the model as it has become.
    """

    batch: Weighed
    calls: list[Call]
    calls_now: list[Call]
    before: Tensor
    now: Tensor


@dataclass(frozen=True)
class _Step:
    """A decoder layer, and the linear layers in it."""

    at: int
    block: nn.Module
    layers: dict[str, nn.Linear]

    def through(self, states: Tensor, calls: Sequence[Call]) -> Tensor:
        """What the decoder layer makes of hidden states."""
        others, named = calls[self.at]
        return _states(self.block(states, *others, **named))


def _shown(step: _Step, runs: Sequence[_Run]) -> dict[str, Seen]:
    """What the linear layers of a decoder layer are shown; takes `before` of the runs past it."""
    found = {name: Seen(Shown.nothing(layer), Shown.nothing(layer)) for name, layer in step.layers.items()}
    for at, run in enumerate(runs):
        with _given(step.layers) as before:
            run.before = step.through(run.before, run.calls)
        with _given(step.layers) as now:
            step.through(run.now, run.calls_now)
        tokens = len(run.batch.texts) * max(len(text.tokens.input_ids) for text in run.batch.texts)
        for name, weights in run.batch.weights.items():
            if name not in found or name not in before:
                continue
            x, q = before[name], now.get(name)
            # the tokens that an expert is sent may be others now: there is nothing to compare then
            paired = q is not None and len(q) == len(x) and len(x) % tokens == 0
            _part(found[name], at).add(x, q if paired and q is not None else x, _of_rows(weights, x))
    return found


def _as_it_is(model: Any, batches: Sequence[Weighed], layers: Mapping[str, nn.Linear]) -> dict[str, Seen]:
    found = {name: Seen(Shown.nothing(layer), Shown.nothing(layer)) for name, layer in layers.items()}
    for at, batch in enumerate(batches):
        with _given(layers) as given:
            _run_through(model, batch)
        for name, weights in batch.weights.items():
            if name in found and name in given:
                _part(found[name], at).add(given[name], given[name], _of_rows(weights, given[name]))
    return found


def _part(seen: Seen, batch: int) -> Shown:
    return seen.held if batch % HELD_OUT == HELD_OUT - 1 else seen.told


def _of_rows(weights: Tensor, rows: Tensor) -> Tensor:
    """(rows,) weights; all alike where an expert was sent other tokens when they were taken."""
    return weights if len(weights) == len(rows) else weights.square().mean().sqrt().expand(len(rows))


def _entered(model: Any, batches: Sequence[Weighed]) -> list[_Run]:
    """The batches before the first decoder layer; none where a model is more than one such layer after the other."""
    blocks, runs = _blocks(model), list[_Run]()
    last = _returned_last(model, batches[0], blocks) if batches and blocks else None
    if last is None:
        return []
    for batch in batches:
        with _standing_aside(blocks, last), _watched_calls(blocks) as (first, calls):
            _run_through(model, batch)
        if len(first) != 1 or len(calls) != len(blocks):
            return []
        runs.append(_Run(batch, calls, _own(calls), first[0], first[0]))
    return runs if _follow_each_other(runs[0], blocks, last) else []


def _returned_last(model: Any, batch: Weighed, blocks: Sequence[nn.Module]) -> Any:
    """What the last decoder layer returns, if it is run; else none."""
    found: list[Any] = []
    hook = blocks[-1].register_forward_hook(lambda _, __, output: found.append(output))
    try:
        _run_through(model, batch)
    finally:
        hook.remove()
    return found[-1] if found else None


@contextmanager
def _standing_aside(blocks: Sequence[nn.Module], like: Any) -> Iterator[None]:
    """Within the block, decoder layers return the hidden states that they are given, in the form of an output `like`.

    So what they are called with is learned without the price of what they do.
    """

    def aside(*given: Any, **named: Any) -> Any:
        states = given[0] if given else named.get("hidden_states")
        return (states,) if isinstance(like, tuple) else states

    before = [block.__dict__.get("forward") for block in blocks]
    for block in blocks:
        block.forward = aside  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            if own is None:
                del block.forward
            else:
                block.forward = own


@contextmanager
def _watched_calls(blocks: Sequence[nn.Module]) -> Iterator[tuple[list[Tensor], list[Call]]]:
    """Within the block, takes in the hidden states before the first decoder layer, and what each is called with."""
    first, calls = list[Tensor](), list[Call]()

    def enter(block: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        others = dict(named)
        states = given[0] if given else others.pop("hidden_states", None)
        if block is blocks[0] and isinstance(states, Tensor):
            first.append(states)
        calls.append((given[1:], others))

    hooks = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in blocks]
    try:
        yield first, calls
    finally:
        for hook in hooks:
            hook.remove()


def _follow_each_other(run: _Run, blocks: Sequence[nn.Module], last: Any) -> bool:
    """Whether what the last decoder layer returned is what comes of one after the other, and nothing else is passed."""
    states, calls = run.before, _own(run.calls)
    for block, (others, named) in zip(blocks, calls, strict=True):
        output = block(states, *others, **named)
        if isinstance(output, tuple) and any(each is not None for each in output[1:]):
            return False
        states = _states(output)
    return torch.allclose(states, _states(last), rtol=1e-3, atol=1e-3 * float(states.abs().mean()), equal_nan=True)


def _own(calls: Sequence[Call]) -> list[Call]:
    """The calls with mappings and lists of their own, each shared by the layers that shared it."""
    mine: dict[int, Any] = {}

    def own(value: Any) -> Any:
        if isinstance(value, (MutableMapping, list)):
            return mine.setdefault(id(value), copy.copy(value))
        return value

    return [(tuple(map(own, others)), {name: own(value) for name, value in named.items()}) for others, named in calls]


@contextmanager
def _given(layers: Mapping[str, nn.Linear]) -> Iterator[Inputs]:
    """Within the block, takes in what linear layers are given, call after call; after it, all of that."""
    calls: dict[str, list[Tensor]] = {}
    found: Inputs = {}

    def watch(name: str) -> Any:
        return lambda _, given: calls.setdefault(name, []).append(given[0].flatten(0, -2))

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
    found.update({name: own[0] if len(own) == 1 else torch.cat(own) for name, own in calls.items()})


@contextmanager
def _put_back(layers: Mapping[str, nn.Linear]) -> Iterator[None]:
    """After the block, the layers have the weights that they had before it."""
    kept = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    try:
        yield
    finally:
        for name, weight in kept.items():
            layers[name].weight.copy_(weight)


def _blocks(model: Any) -> Sequence[nn.Module]:
    """The decoder layers; none where they are kept in no list of that length."""
    try:
        return list(decoder_layers(model))
    except UserError:
        return []


def _within(block: nn.Module, layers: Mapping[str, nn.Linear]) -> dict[str, nn.Linear]:
    parts = set(block.modules())
    return {name: layer for name, layer in layers.items() if layer in parts}


def _run_through(model: Any, batch: Weighed) -> None:
    padded = pad_texts([text.tokens.input_ids for text in batch.texts], model.device)
    hidden_states(model, padded["input_ids"], padded["attention_mask"])


def _states(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found
