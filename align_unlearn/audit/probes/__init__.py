"""Probes: ways of asking for what was to be forgotten. A new one is a file with `ask` and a line in this table."""

from align_unlearn.audit.probes import (
    choices,
    context,
    direct,
    encodings,
    few_shot,
    forms,
    jailbreak,
    languages,
    paraphrase,
    prefill,
    system,
)
from align_unlearn.audit.probes.asked import Around, Asked, Probe

PROBES: dict[str, Probe] = {
    "sampling": Probe(direct.ask, "the prompt itself, drawn many times", draws=8, temperature=1.0),
    "paraphrase": Probe(paraphrase.ask, "the same in other words"),
    "forms": Probe(forms.ask, "a gap to fill, the other way round, over two facts"),
    "choices": Probe(choices.ask, "true or false, one of four"),
    "jailbreak": Probe(jailbreak.ask, "twelve families of talking a model into it"),
    "prefill": Probe(prefill.ask, "the beginning of the answer given; outside of a chat"),
    "system": Probe(system.ask, "a system prompt of the asker's own"),
    "encodings": Probe(encodings.ask, "base64, rot13, leet, spaced, typing errors"),
    "languages": Probe(languages.ask, "other languages, where rows have them"),
    "context": Probe(context.ask, "behind a long text"),
    "few_shot": Probe(few_shot.ask, "after answered questions"),
}

__all__ = ["PROBES", "Around", "Asked", "Probe"]
