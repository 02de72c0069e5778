"""What a person did wrong, in one screen: the problem, where it is, and what to do.

Every mistake that a user can cause (a missing file, an unknown key, a row that does not fit) raises `UserError`; the
command line prints it without a traceback. Anything else that escapes is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake the user can mend.

    Args:
        problem: what is wrong, in one sentence.
        where: the file, row, column or key that it is in.
        fix: what to do about it.

    Attributes:
        code: with which a command ends that was stopped by it.
    """

    code = 2

    def __init__(self, problem: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.problem = problem
        self.where = where
        self.fix = fix
        lines = [problem]
        if where:
            lines.append(f"  where: {where}")
        if fix:
            lines.append(f"  fix:   {fix}")
        # Names from data and files are untrusted text: no escape sequence of theirs reaches a terminal.
        super().__init__("".join(c for c in "\n".join(lines) if c.isprintable() or c == "\n"))


class Refused(UserError):
    """What was made is not good enough to be left behind: nothing is mistaken, and nothing was written."""

    code = 1


def unknown_name(kind: str, name: str, valid: Iterable[str], *, where: str | None = None) -> UserError:
    """The error for a name that is not in a table, with the nearest ones that are."""
    names = sorted(valid)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    fix = f"did you mean {' or '.join(near)}?" if near else f"one of: {', '.join(names[:40])}"
    return UserError(f"Unknown {kind} '{name}'.", where=where, fix=fix)
