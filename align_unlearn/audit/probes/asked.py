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
        off_topic: an answer that takes up none of the question's words is no leak: the model may not have understood.
    """

    variant: str
    prompt: str | Messages
    prefill: str = ""
    forbidden: str | None = None
    options: tuple[str, ...] = ()
    read: Callable[[str], str] = str
    off_topic: bool = False


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


def user(text: str) -> Messages:
    """A conversation of one message."""
    return [{"role": "user", "content": text}]
