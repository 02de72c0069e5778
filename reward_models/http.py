"""A reward that a service gives: OpenRLHF's remote reward model protocol.

    rewards:
      service: {model: http, kwargs: {url: http://localhost:5000/get_reward}}

The service gets `{"query": [...], "queries": [...], "prompts": [...]}`, a query being the prompt and the response in
one text, and answers `{"rewards": [...]}`, one number (or null) a row.
"""

from __future__ import annotations

import time
from typing import Any
from urllib.parse import urlsplit

import requests

from align_unlearn.data.examples import Messages
from align_unlearn.data.exchange import plain_prompt
from align_unlearn.errors import UserError

AGAIN = (429, 500, 502, 503, 504)
"""Statuses that mean: ask again later."""


class Http:
    """Asks a service, again with back-off while it is not there, until a deadline.

    What the policy says is sent to `url` and nowhere else: a redirect is an error.

    Args:
        url: where to.
        deadline: seconds that one batch may take, repetitions included.
        first_pause: seconds before the first repetition; each further one waits twice as long.
        headers: sent along (an access token, …).
        key: of the answer.

    Raises:
        UserError: the address is no web address; at scoring: no answer by the deadline, a redirect, a refusal, or an
            answer of another form.
    """

    def __init__(
        self,
        url: str,
        deadline: float = 60.0,
        first_pause: float = 0.5,
        headers: dict[str, str] | None = None,
        key: str = "rewards",
    ) -> None:
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
            raise UserError("This is no web address.", where=f"reward http, url {url}", fix="http://host:port/path")
        self.url, self.deadline, self.first_pause, self.headers, self.key = url, deadline, first_pause, headers, key

    def score(self, prompts: list[Messages], completions: list[str], **columns: Any) -> list[float | None]:
        """What the service says."""
        asked = [plain_prompt(prompt) for prompt in prompts]
        queries = [f"{prompt}\n{text}" for prompt, text in zip(asked, completions, strict=True)]
        found = self._ask({"query": queries, "queries": queries, "prompts": asked})
        rewards = found.get(self.key) if isinstance(found, dict) else None
        if not isinstance(rewards, list):
            raise UserError(f"The service's answer has no list '{self.key}'.", where=self.url)
        return rewards

    def _ask(self, body: dict[str, Any]) -> Any:
        until, pause = time.monotonic() + self.deadline, self.first_pause
        while True:
            left = until - time.monotonic()
            try:
                reply = requests.post(
                    self.url, json=body, headers=self.headers, timeout=max(0.05, left), allow_redirects=False
                )
                problem = f"status {reply.status_code}"
            except (requests.ConnectionError, requests.Timeout) as error:
                reply, problem = None, type(error).__name__
            if reply is not None and reply.status_code not in AGAIN:
                return self._read(reply)
            if time.monotonic() + pause >= until:
                raise UserError(f"The service gave no answer in {self.deadline:g} s: {problem}.", where=self.url)
            time.sleep(pause)
            pause *= 2

    def _read(self, reply: requests.Response) -> Any:
        if 300 <= reply.status_code < 400:
            raise UserError("The service redirects; completions are sent nowhere else.", where=self.url,
                            fix="the address that it redirects to, if you trust it")  # fmt: skip
        if reply.status_code != 200:
            raise UserError(f"The service refused: status {reply.status_code}.", where=self.url)
        try:
            return reply.json()
        except ValueError as error:
            raise UserError("The service's answer is not JSON.", where=self.url) from error
