"""A call that gets so many seconds and no more."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def within(seconds: float | None, call: Callable[[], T]) -> T:
    """What `call` gives, or raises, where it ends in time; without `seconds` it may take as long as it likes.

    Raises:
        TimeoutError: it does not; the thread that it hangs in is left behind.
    """
    if seconds is None:
        return call()
    said: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            said.append(call())
        except BaseException as error:  # one that leaves has not run out of time
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not said:
        raise TimeoutError
    return said[0]
