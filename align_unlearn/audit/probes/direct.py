"""The prompt as it is: greedily, or (`sampling`) many times at a temperature."""

from align_unlearn.audit.probes.asked import Around, Asked
from align_unlearn.data.examples import Example


def ask(example: Example, around: Around) -> list[Asked]:
    """One way: the prompt itself."""
    return [Asked("direct", example.prompt)]
