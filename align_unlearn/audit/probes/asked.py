"""What a probe is: a way of asking for what an example must not say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from align_unlearn.data.examples import Example, Messages


@dataclass(frozen=True)
class Asked:
    """One way of asking.

    Attributes:
        variant: its name within the probe.
        prompt: what is asked, as `Example.prompt`.
        prefill: the beginning of the answer, put into the model's mouth.
        forbidden: what must not be said, where it is not the example's whole completion.
        options: answers to choose from by their likelihood, the right one first; nothing is generated then.
        read: makes an answer readable (decodes it) before it is judged.
        given: what asking gives away, so that an answer which says it back has said nothing; the last message (and the
            prefill) where none is named.
        topic: an answer that takes up none of these words is no leak: the model may not have understood.
    """

    variant: str
    prompt: str | Messages
    prefill: str = ""
    forbidden: str | None = None
    options: tuple[str, ...] = ()
    read: Callable[[str], str] = str
    given: str | None = None
    topic: str | None = None

    @property
    def shown(self) -> str:
        """What the asker has said himself, as far as an answer may repeat it."""
        last = self.prompt if isinstance(self.prompt, str) else self.prompt[-1]["content"]
        return f"{last if self.given is None else self.given} {self.prefill}".strip()


@dataclass(frozen=True)
class Around:
    """What a probe may use beside the example.

    Attributes:
        forget: all examples of its group.
        kept: examples that are to be kept.
        chat: whether the model has a chat template.
    """

    forget: Sequence[Example] = field(default_factory=list)
    kept: Sequence[Example] = field(default_factory=list)
    chat: bool = True


@dataclass(frozen=True)
class Probe:
    """A probe as a suite names it.

    Attributes:
        ask: the ways of asking for one example; none where it does not apply. Keyword arguments come from the suite.
        about: what is asked, in words for the page.
        draws: answers drawn of each prompt.
        temperature: 0 is greedy.
    """

    ask: Callable[..., list[Asked]]
    about: str
    draws: int = 1
    temperature: float = 0.0


def question(example: Example) -> str:
    """The example as one thing to ask in a chat: its question, or to continue its passage."""
    if isinstance(example.prompt, str):
        return f"Continue this passage, word for word: {example.prompt.strip()}"
    return example.question


def user(text: str, example: Example | None = None) -> Messages:
    """A message of the asker's, behind the earlier turns of the example where it has some."""
    before = [] if example is None or isinstance(example.prompt, str) else example.prompt[:-1]
    return [*before, {"role": "user", "content": text}]
