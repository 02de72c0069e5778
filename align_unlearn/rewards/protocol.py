"""What a reward model is: one method over text, so that its tokenizer is its own.

    class Polite:
        def score(self, prompts, completions, **columns):
            return [float("please" in completion.lower()) for completion in completions]

Higher is better. `None` means that it does not apply to the row. Raising stops the run with the row that caused it:
a reward that fails never becomes a 0.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from align_unlearn.data.examples import Messages


@runtime_checkable
class RewardModel(Protocol):
    """Scores completions of prompts."""

    def score(self, prompts: list[Messages], completions: list[str], **columns: Any) -> Sequence[float | None]:
        """One score a row.

        Args:
            prompts: each a list of messages; the last one is the user's.
            completions: what the policy said.
            **columns: the data set's other columns, a list each; `kind` is `forget`, `neighbour` or `retain`, `plain`
                whether the prompt is text to be continued and no message.
        """


@runtime_checkable
class SharesBase(Protocol):
    """A reward model that can sit on the policy's own base, as one more adapter, instead of loading a base itself."""

    def attach(self, model: Any, tokenizer: Any) -> None:
        """Called once, before anything is scored.

        Args:
            model: the policy, a PEFT model.
            tokenizer: the policy's.

        Raises:
            UserError: it was made on another base.
        """


@runtime_checkable
class FollowsRun(Protocol):
    """A reward model that wants to know how far a run is, or to say something in its log."""

    def follow(self, state: Callable[[], Any], log_metric: Callable[[str, float], None]) -> None:
        """Called once, before anything is scored.

        Args:
            state: gives the trainer's `TrainerState` as it is now.
            log_metric: adds a figure to the next line of the log, averaged over what is said until then.
        """


class FromTRL:
    """A TRL reward function as a reward model: called with `prompts`, `completions` and the columns by name.

    It is also given `trainer_state` and `log_metric`, as TRL's trainers do; outside of a run the state is none. Columns
    that it adds with `log_extra` are not kept: a run's completions lie in `samples.jsonl`.

    Args:
        function: `f(prompts, completions, **columns) -> list[float | None]`, `async` or not; as TRL's trainers do, it
            is given chat messages for both where prompts are messages, and text for both where they are text.
        **kwargs: handed to it beside the columns.
    """

    def __init__(self, function: Callable[..., Any], **kwargs: Any) -> None:
        self.function = function
        self.kwargs = kwargs
        self._state: Callable[[], Any] = lambda: None
        self._log_metric: Callable[[str, float], None] = lambda name, value: None
        self._loop: asyncio.AbstractEventLoop | None = None

    def score(self, prompts: list[Messages], completions: list[str], **columns: Any) -> Sequence[float | None]:
        """What the function says."""
        plain = columns.get("plain") or [False] * len(prompts)
        asked = [each[-1]["content"] if text else each for each, text in zip(prompts, plain, strict=True)]
        said = [own if text else [{"role": "assistant", "content": own}]
                for own, text in zip(completions, plain, strict=True)]  # fmt: skip
        told = {"trainer_state": self._state(), "log_metric": self._log_metric, "log_extra": _dropped}
        found = self.function(prompts=asked, completions=said, **{**columns, **told, **self.kwargs})
        return self._awaited(found) if inspect.isawaitable(found) else found

    def follow(self, state: Callable[[], Any], log_metric: Callable[[str, float], None]) -> None:
        """The function is told of this run from now on."""
        self._state, self._log_metric = state, log_metric

    def _awaited(self, found: Any) -> Sequence[float | None]:
        """What it comes to, on a loop of its own: a notebook has one that runs already, and clients stay on theirs."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, daemon=True).start()

        async def waited() -> Sequence[float | None]:
            scores: Sequence[float | None] = await found
            return scores

        return asyncio.run_coroutine_threadsafe(waited(), self._loop).result()


def _dropped(column: str, values: Sequence[Any]) -> None:
    """TRL's `log_extra` where there is no table that it could add to."""


def as_messages(prompt: str | Messages) -> Messages:
    """A prompt as messages: plain text is one message of the user's."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
