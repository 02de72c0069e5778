"""A model changed one decoder layer after the other, each knowing what those before it have lost.

Rounded on what the unrounded model shows them, layers keep what they make of inputs that they will never see, and what
is lost adds up along the depth: at the last layers it is ten times what one of them loses by itself, and half of it
could be told from the inputs that come (SmolLM2-135M in Q4_0). So each layer is shown both, what it was given and what
it will be given, and is asked for what the first led to, from the second (GPTAQ, arXiv:2504.02692).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from align_unlearn.data.batches import pad_texts
from align_unlearn.export.weighing import Weighed
from align_unlearn.modeling.forward import decoder_layers, hidden_states
from align_unlearn.modeling.generate import progress_bar
from align_unlearn.modeling.round_trip import linear_layers
from align_unlearn.modeling.rounding import DAMPING, damped

Inputs = dict[str, Tensor]
"""By linear layer, (rows, in)."""


@dataclass(frozen=True)
class Seen:
    """What a linear layer is shown, x before anything was changed and q now, each row with its weight m.

    Attributes:
        moments: (in, in) Σ m² q qᵀ.
        missing: (in, in) Σ m² (x − q) qᵀ.
    """

    moments: Tensor
    missing: Tensor

    def wanted(self, weight: Tensor, damping: float = DAMPING) -> Tensor:
        """(out, in) the weight that makes of q what comes closest to what `weight` made of x: least squares.

        Args:
            weight: (out, in).
            damping: of the mean of the moments' diagonal: how firmly it stays as it is where q says little.
        """
        spread = damped(self.moments.double(), damping)
        missed = weight.double() @ self.missing.double()
        found: Tensor = weight.double() + torch.linalg.solve(spread, missed.T).T
        return found.float()

    def add(self, before: Tensor, now: Tensor, weights: Tensor) -> None:
        """Takes in (rows, in) of x and q, and (rows,) weights."""
        now = now.float() * weights[:, None]
        self.moments.addmm_(now.T, now)
        self.missing.addmm_((before.float() * weights[:, None] - now).T, now)


@torch.no_grad()
def in_turn(model: Any, batches: Sequence[Weighed], changed: Callable[[str, Seen], Tensor | None], title: str) -> None:
    """Asks of every linear layer, from the first decoder layer to the last, what its weight is to be.

    A decoder layer's linear layers are asked together. Those outside of decoder layers, and all of a model whose
    decoder layers do not follow each other, are shown what they are given in the model as it is.

    Args:
        model: a plain model; left as it was.
        batches: texts with their weights, of this model.
        changed: of a layer's name and what it is shown, its new weight; none for the one that it has.
        title: for the progress bar.
    """
    layers = linear_layers(model)
    runs = [_entered(model, batch) for batch in batches]
    steps = [_Step(at, block, _within(block, layers)) for at, block in enumerate(decoder_layers(model))]
    if not all(run.chained for run in runs):
        steps = []
    alone = layers.keys() - {name for step in steps for name in step.layers}
    with progress_bar() as progress:
        bar = progress.add_task(title, total=len(layers))

        def ask(shown: Mapping[str, Seen]) -> None:
            for name, seen in shown.items():
                if (weight := changed(name, seen)) is not None:
                    layers[name].weight.copy_(weight)
                progress.advance(bar)

        if alone:
            with _put_back({name: layers[name] for name in layers if name in alone}) as own:
                ask(_as_it_is(model, runs, own))
        for step in steps:
            shown = _shown(step, runs)
            with _put_back(step.layers):
                ask(shown)
                for run in runs:
                    run.now = step.call(run, run.now)


@dataclass
class _Run:
    """A batch on its way through the decoder layers.

    Attributes:
        batch: the texts.
        calls: by decoder layer, what it is called with beside the hidden states.
        chained: whether each decoder layer is given what the one before it returned.
        before: hidden states in the model as it is.
        now: hidden states in the model as it has become.
    """

    batch: Weighed
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    chained: bool
    before: Tensor
    now: Tensor


@dataclass(frozen=True)
class _Step:
    """A decoder layer, and the linear layers in it."""

    at: int
    block: nn.Module
    layers: dict[str, nn.Linear]

    def call(self, run: _Run, states: Tensor) -> Tensor:
        """What the decoder layer makes of hidden states."""
        others, named = run.calls[self.at]
        return _states(self.block(states, *others, **named))


def _shown(step: _Step, runs: Sequence[_Run]) -> dict[str, Seen]:
    """What the linear layers of a decoder layer are shown; takes `before` of the runs past it."""
    found = {name: _nothing(layer) for name, layer in step.layers.items()}
    for run in runs:
        with _given(step.layers) as before:
            run.before = step.call(run, run.before)
        with _given(step.layers) as now:
            step.call(run, run.now)
        _take_in(found, run, before, now)
    return found


def _as_it_is(model: Any, runs: Sequence[_Run], layers: Mapping[str, nn.Linear]) -> dict[str, Seen]:
    found = {name: _nothing(layer) for name, layer in layers.items()}
    for run in runs:
        with _given(layers) as given:
            _run_through(model, run.batch)
        _take_in(found, run, given, given)
    return found


def _take_in(found: Mapping[str, Seen], run: _Run, before: Inputs, now: Inputs) -> None:
    for name, weights in run.batch.weights.items():
        if name in found and name in before:
            x, q = before[name], now.get(name)
            # an expert may be sent other tokens now than before: there is nothing to compare then
            found[name].add(x, x if q is None or q.shape != x.shape else q, weights)


def _nothing(layer: nn.Linear) -> Seen:
    zeros = torch.zeros(layer.in_features, layer.in_features, device=layer.weight.device)
    return Seen(zeros, zeros.clone())


def _entered(model: Any, batch: Weighed) -> _Run:
    """The batch before the first decoder layer."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    first, last, chained = list[Tensor](), list[Tensor](), list[bool]()

    def enter(_: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        named = dict(named)
        states, *others = given or (named.pop("hidden_states"),)
        if not calls:
            first.append(states)
        else:
            chained.append(torch.equal(states, last.pop()))
        calls.append((tuple(others), named))

    hooks = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in decoder_layers(model)]
    hooks += [
        block.register_forward_hook(lambda _, __, out: last.append(_states(out))) for block in decoder_layers(model)
    ]
    try:
        _run_through(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return _Run(batch, calls, all(chained), first[0], first[0])


@contextmanager
def _given(layers: Mapping[str, nn.Linear]) -> Iterator[Inputs]:
    """Within the block, fills with what linear layers are given."""
    found: Inputs = {}

    def watch(name: str) -> Any:
        return lambda _, given: found.__setitem__(name, given[0].flatten(0, -2))

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _put_back(layers: dict[str, nn.Linear]) -> Iterator[dict[str, nn.Linear]]:
    """After the block, the layers have the weights that they had before it."""
    kept = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    try:
        yield layers
    finally:
        for name, weight in kept.items():
            layers[name].weight.copy_(weight)


def _within(block: nn.Module, layers: Mapping[str, nn.Linear]) -> dict[str, nn.Linear]:
    parts = set(block.modules())
    return {name: layer for name, layer in layers.items() if layer in parts}


def _run_through(model: Any, batch: Weighed) -> None:
    padded = pad_texts([text.tokens.input_ids for text in batch.texts], model.device)
    hidden_states(model, padded["input_ids"], padded["attention_mask"])


def _states(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found
