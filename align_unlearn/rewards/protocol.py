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


class FromTRL:
    """A TRL reward function as a reward model: called with `prompts`, `completions` and the columns by name.

    Args:
        function: `f(prompts, completions, **columns) -> list[float | None]`, `async` or not; as TRL's trainers do, it
            is given chat messages for both where prompts are messages, and text for both where they are text.
        **kwargs: handed to it beside the columns.
    """

    def __init__(self, function: Callable[..., Any], **kwargs: Any) -> None:
        self.function = function
        self.kwargs = kwargs
        self._loop: asyncio.AbstractEventLoop | None = None

    def score(self, prompts: list[Messages], completions: list[str], **columns: Any) -> Sequence[float | None]:
        """What the function says."""
        plain = columns.get("plain") or [False] * len(prompts)
        asked = [each[-1]["content"] if text else each for each, text in zip(prompts, plain, strict=True)]
        said = [own if text else [{"role": "assistant", "content": own}]
                for own, text in zip(completions, plain, strict=True)]  # fmt: skip
        found = self.function(prompts=asked, completions=said, **{**columns, **self.kwargs})
        return self._awaited(found) if inspect.isawaitable(found) else found

    def _awaited(self, found: Any) -> Sequence[float | None]:
        """What it comes to, on a loop of its own: a notebook has one that runs already, and clients stay on theirs."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, daemon=True).start()

        async def waited() -> Sequence[float | None]:
            scores: Sequence[float | None] = await found
            return scores

        return asyncio.run_coroutine_threadsafe(waited(), self._loop).result()


def as_messages(prompt: str | Messages) -> Messages:
    """A prompt as messages: plain text is one message of the user's."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
