"""A reward that a service gives: OpenRLHF's remote reward model protocol.

    rewards:
      service: {model: http, kwargs: {url: http://localhost:5000/get_reward}}

The service gets `{"query": [...], "queries": [...], "prompts": [...]}`, a query being the prompt and the response in
one text, and answers `{"rewards": [...]}`, one number (or null) a row.
"""

from __future__ import annotations

import json
import time
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import requests

from align_unlearn.data.examples import Messages
from align_unlearn.data.exchange import plain_prompt
from align_unlearn.errors import UserError
from align_unlearn.rewards.deadline import within

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
        nulls: take null for "does not apply"; an error where it is not allowed, since a service may mean "failed".

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
        nulls: bool = False,
    ) -> None:
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
            raise UserError("This is no web address.", where=f"reward http, url {url}", fix="http://host:port/path")
        self.url, self.deadline, self.first_pause, self.key, self.nulls = url, deadline, first_pause, key, nulls
        self.session = requests.Session()
        self.session.trust_env = False  # no proxy and no .netrc of the environment: to `url` and nowhere else
        self.session.headers.update(headers or {})

    def score(self, prompts: list[Messages], completions: list[str], **columns: Any) -> list[float | None]:
        """What the service says."""
        asked = [plain_prompt(prompt) for prompt in prompts]
        queries = [f"{prompt}\n{text}" for prompt, text in zip(asked, completions, strict=True)]
        found = self._ask({"query": queries, "queries": queries, "prompts": asked})
        rewards = found.get(self.key) if isinstance(found, dict) else None
        if not isinstance(rewards, list):
            raise UserError(f"The service's answer has no list '{self.key}'.", where=self.url)
        if None in rewards and not self.nulls:
            at = rewards.index(None)
            raise UserError(
                "The service gave null for a row.",
                where=f"{self.url}, row {at}: prompt {asked[at][:80]!r}, completion {completions[at][:80]!r}",
                fix="nulls: true in its kwargs, if null means that the reward does not apply",
            )
        return rewards

    def _ask(self, body: dict[str, Any]) -> Any:
        until, pause = time.monotonic() + self.deadline, self.first_pause
        while True:
            left = max(0.05, until - time.monotonic())
            try:  # the time-out of requests is one of silence: a service that drips its answer would get any time
                reply = within(left, partial(self._post, body, left))
                if reply.status_code not in AGAIN:
                    return self._read(reply)
                problem = f"status {reply.status_code}"
            except (requests.RequestException, TimeoutError) as error:
                problem = type(error).__name__
            if time.monotonic() + pause >= until:
                raise UserError(f"The service gave no answer in {self.deadline:g} s: {problem}.", where=self.url)
            time.sleep(pause)
            pause *= 2

    def _post(self, body: dict[str, Any], left: float) -> requests.Response:
        return self.session.post(self.url, json=body, timeout=left, allow_redirects=False)

    def _read(self, reply: requests.Response) -> Any:
        if 300 <= reply.status_code < 400:
            raise UserError("The service redirects; completions are sent nowhere else.", where=self.url,
                            fix="the address that it redirects to, if you trust it")  # fmt: skip
        if reply.status_code != 200:
            raise UserError(f"The service refused: status {reply.status_code}.", where=self.url)
        try:
            return json.loads(reply.content)
        except ValueError as error:
            raise UserError("The service's answer is not JSON.", where=self.url) from error
