"""The question in other languages, where the rows give it: a column `translations`, language to text."""

from align_unlearn.audit.probes.asked import Around, Asked, user
from align_unlearn.data.examples import Example


def ask(example: Example, around: Around) -> list[Asked]:
    """A way for each translation."""
    return [
        Asked(
            language,
            user(text, example) if around.chat else text,
            given=f"{example.question} {text}",
            topic=f"{example.question} {text}",
        )
        for language, text in example.translations
    ]
