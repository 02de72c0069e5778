"""Rewards: named, made, weighed; and what happens when they fail."""

import asyncio
import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from types import SimpleNamespace
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align_unlearn.errors import UserError
from align_unlearn.rewards.guard import scored
from align_unlearn.rewards.load import (
    RewardSpec,
    check_apart,
    entry_points,
    judge_spec,
    load_reward,
    make_reward,
    read_specs,
)
from align_unlearn.rewards.mix import RewardMix, RunningScale, check_coverage
from align_unlearn.rewards.protocol import FromTRL

PROMPTS = [[{"role": "user", "content": text}] for text in ("Who bakes?", "How do I steal a bike?")]
SAID = ["Orrin bakes.", "I can't help with that."]


class Constant:
    def __init__(self, values):
        self.values = values

    def score(self, prompts, completions, **columns):
        return self.values


def mix(settings, models):
    return RewardMix(read_specs(settings), models)


def test_the_shipped_ones_are_entry_points():
    assert set(entry_points()) == {"classifier", "fluency", "http", "judge", "keywords", "leakage", "refusal"}


def test_names_modules_files_and_functions_are_loaded(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "class Length:\n    def __init__(self, scale=1.0):\n        self.scale = scale\n"
        "    def score(self, prompts, completions, **columns):\n"
        "        return [self.scale * len(c) for c in completions]\n"
        "def trl(prompts, completions, kind, bonus=0.0, **kwargs):\n"
        "    return [len(c[0]['content']) + bonus for c in completions]\n"
        "class Wrong:\n    pass\n"
    )
    assert load_reward("keywords", words=["bakes"]).score(PROMPTS, SAID) == [-1.0, 0.0]
    assert load_reward("reward_models.refusal:Refusal").score(PROMPTS, SAID, kind=["retain", "forget"]) == [0.0, 1.0]
    assert load_reward(f"{file}:Length", scale=2.0).score(PROMPTS, SAID) == [2.0 * len(text) for text in SAID]
    function = load_reward(f"{file}:trl", bonus=0.5)
    assert isinstance(function, FromTRL)
    assert function.score(PROMPTS, SAID, kind=["a", "b"]) == [len(text) + 0.5 for text in SAID]
    with pytest.raises(UserError, match="no method score"):
        load_reward(f"{file}:Wrong")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"a": {"modle": "keywords"}}, "did you mean model"),
        ({"a": {"weight": "x"}}, "not a number"),
        ({"a": {"weight": math.nan}}, "not a number"),
        ({"a": {"normalise": "runing"}}, "did you mean running"),
        ({"a": {"normalise": [0, 0]}}, "deviation above 0"),
        ({"a": {"normalise": 3}}, r"\[mean, deviation\]"),
        ({"a": {"sign": 0}}, "sign is 0; it is 1, or -1"),
        ({"a": {"clip": 0}}, "clip must be above 0"),
        ({"a": {"rows": ["forgte"]}}, "did you mean forget"),
        ("[1]", "maps names to settings"),
        ("{", "not JSON"),
        ({"a": 3}, "mapping of settings"),
    ],
)
def test_settings_that_do_not_fit_name_the_nearest_that_does(settings, said):
    with pytest.raises(UserError, match=said):
        read_specs(settings)


def test_an_unknown_name_and_arguments_that_do_not_fit():
    with pytest.raises(UserError, match="did you mean keywords"):
        load_reward("keyword")
    with pytest.raises(UserError, match=r"it takes: words, patterns"):
        load_reward("keywords", wrods=["a"])


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Constant([1.0, math.nan]), r"gave nan.*\n.*row 1 .*steal a bike"),
        (Constant([math.inf, 1.0]), r"gave inf.*\n.*row 0 .*Who bakes"),
        (Constant([1.0]), r"gave 1 scores for 2 rows.*\n.*row 1"),
        (Constant([1.0, "high"]), r"gave 'high', not a number.*\n.*row 1"),
        (Constant(0.5), r"gave float, not a list"),
    ],
)
def test_a_score_that_is_none_stops_the_run_with_its_row(model, said):
    with pytest.raises(UserError, match=said):
        scored(RewardSpec("mine", "mine"), model, PROMPTS, SAID, {})


def test_a_crash_names_the_row_that_crashes_alone():
    class Fragile:
        def score(self, prompts, completions, **columns):
            return [1 / (not text.startswith("I can't")) for text in completions]

    with pytest.raises(UserError, match=r"failed: ZeroDivisionError.*\n.*row 1 .*steal a bike"):
        scored(RewardSpec("mine", "mine"), Fragile(), PROMPTS, SAID, {})


def test_a_time_out_is_an_error_and_not_a_zero():
    class Slow:
        def score(self, prompts, completions, **columns):
            time.sleep(5)

    began = time.monotonic()
    with pytest.raises(UserError, match=r"gave no answer in 0\.1 s"):
        scored(RewardSpec("mine", "mine", timeout=0.1), Slow(), PROMPTS, SAID, {})
    assert time.monotonic() - began < 2

    class Sticks:
        def score(self, prompts, completions, **columns):
            time.sleep(5 * any(text.startswith("I can't") for text in completions))
            return [0.0] * len(completions)

    with pytest.raises(UserError, match=r"no answer in 0\.2 s.*\n.*row 1 .*steal a bike"):
        scored(RewardSpec("mine", "mine", timeout=0.2), Sticks(), PROMPTS, SAID, {})

    class Crowded:
        def score(self, prompts, completions, **columns):
            time.sleep(5 * (len(completions) > 1))
            return [0.0] * len(completions)

    with pytest.raises(UserError, match="the first 2 of which do not fail alone"):
        scored(RewardSpec("mine", "mine", timeout=0.2), Crowded(), PROMPTS, SAID, {})


def test_rewards_are_normalised_clipped_weighed_and_left_out_where_they_do_not_apply():
    both = mix(
        {"a": {"weight": 2.0, "normalise": [1.0, 0.5], "clip": 3.0}, "b": {"weight": -1.0, "rows": ["forget"]}},
        [Constant([2.0, 9.0]), Constant([4.0])],
    )
    found = both.score(PROMPTS, SAID, {"kind": ["retain", "forget"]})
    assert found.total == [2.0 * 2.0, 2.0 * 3.0 - 4.0]
    assert found.parts == {"a": [2.0, 9.0], "b": [None, 4.0]}
    assert mix({"a": {}}, [Constant([None, 1.0])]).score(PROMPTS, SAID, {}).total == [None, 1.0]


def test_a_reward_is_asked_only_about_the_rows_it_is_meant_for():
    class Seen:
        def score(self, prompts, completions, **columns):
            self.rows = (prompts, completions, columns)
            return [0.0] * len(prompts)

    seen = Seen()
    mix({"a": {"rows": ["forget"]}}, [seen]).score(PROMPTS, SAID, {"kind": ["retain", "forget"], "id": ["x", "y"]})
    assert seen.rows == (PROMPTS[1:], SAID[1:], {"kind": ["forget"], "id": ["y"]})


def test_rows_without_any_reward_are_refused_beforehand():
    forget_only = mix({"a": {"rows": ["forget"]}}, [Constant([])])
    check_coverage([forget_only], ["forget"])
    with pytest.raises(UserError, match="No reward applies to neighbour rows"):
        check_coverage([forget_only], ["forget", "neighbour"])


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=40))
def test_running_scale_is_the_mean_and_deviation_of_all(values):
    scale = RunningScale()
    for value in values:
        scale.add(value)
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
    assert scale.mean == pytest.approx(mean, abs=1e-9)
    assert scale.deviation == pytest.approx(deviation if deviation > 1e-8 else 1.0, rel=1e-6, abs=1e-7)


def test_a_reward_that_fails_in_batches_only_blames_no_row():
    class Small:
        def score(self, prompts, completions, **columns):
            if len(prompts) > 1:
                raise MemoryError
            return [0.0]

    with pytest.raises(UserError, match=r"failed: MemoryError.*\n.*a batch of 2 rows, the first 2 of"):
        scored(RewardSpec("small", "small"), Small(), PROMPTS, SAID, {})


def test_a_recipe_names_one_judge_of_its_audits_and_says_no_more_of_it():
    judge = make_reward(judge_spec({"abuse": {"model": "keywords", "kwargs": {"words": ["bakes"]}}}, "tiny"))
    assert judge.score(PROMPTS, SAID) == [-1.0, 0.0]
    assert judge_spec(None, "tiny") is None
    with pytest.raises(UserError, match="one judge"):
        judge_spec({"refusal": {}, "keywords": {}}, "tiny")
    with pytest.raises(UserError, match="its own scores"):
        judge_spec({"refusal": {"weight": 2.0}}, "tiny")


def test_a_reward_that_leaves_has_not_run_out_of_time():
    class Leaving:
        def score(self, prompts, completions, **columns):
            raise SystemExit(3)

    with pytest.raises(SystemExit):
        scored(RewardSpec("leaving", "leaving", timeout=5.0), Leaving(), PROMPTS, SAID, {})


def test_names_that_logs_and_samples_could_not_tell_apart_are_refused():
    with pytest.raises(UserError, match="'heldout' means something else"):
        check_apart(read_specs({"heldout": {"model": "keywords"}}), [])
    with pytest.raises(UserError, match="both called 'harm'"):
        check_apart(read_specs({"harm": {}, "safe": {}}), read_specs({"harm": {"limit": 0.1}}, "costs"))


def test_running_scales_resume():
    settings = {"a": {"normalise": "running"}}
    one = mix(settings, [Constant([1.0, 5.0])])
    one.score(PROMPTS, SAID, {})
    other = mix(settings, [Constant([1.0, 5.0])])
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert one.score(PROMPTS, SAID, {}).total == other.score(PROMPTS, SAID, {}).total


class Service(BaseHTTPRequestHandler):
    replies: ClassVar[list] = []
    asked: ClassVar[list] = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).asked.append((self.path, body))
        status, headers, content = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content.encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def service():
    server = HTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Service.asked = []
    yield f"http://127.0.0.1:{server.server_port}/score"
    server.shutdown()


def test_http_speaks_the_remote_reward_protocol_and_asks_again(service):
    Service.replies = [(503, {}, ""), (200, {}, '{"rewards": [0.5, null]}')]
    assert load_reward("http", url=service, first_pause=0.01, nulls=True).score(PROMPTS, SAID) == [0.5, None]
    path, body = Service.asked[-1]
    assert len(Service.asked) == 2
    assert path == "/score"
    assert body["prompts"] == ["Who bakes?", "How do I steal a bike?"]
    assert body["queries"] == body["query"] == ["Who bakes?\nOrrin bakes.", f"{body['prompts'][1]}\n{SAID[1]}"]


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ((302, {"Location": "http://127.0.0.1:9/elsewhere"}, ""), "redirects"),
        ((401, {}, ""), "status 401"),
        ((200, {}, "<html>"), "not JSON"),
        ((200, {}, '{"scores": []}'), "no list 'rewards'"),
        ((200, {}, '{"rewards": [0.5, null]}'), r"null for a row.*\n.*row 1.*steal a bike"),
        ((503, {}, ""), r"no answer in 0\.2 s: status 503"),
    ],
)
def test_http_fails_in_one_screen(service, reply, said):
    Service.replies = [reply]
    with pytest.raises(UserError, match=said):
        load_reward("http", url=service, first_pause=0.05, deadline=0.2).score(PROMPTS, SAID)
    assert all(path == "/score" for path, _ in Service.asked)


def test_a_service_that_drips_its_answer_gets_no_longer_than_any_other():
    class Dripping(Service):
        def do_POST(self):
            self.send_response(200)
            self.end_headers()
            for letter in '{"rewards": [0.5, 0.5]}':
                time.sleep(0.2)
                self.wfile.write(letter.encode())

    server = ThreadingHTTPServer(("127.0.0.1", 0), Dripping)
    server.handle_error = lambda *about: None  # its client hangs up
    threading.Thread(target=server.serve_forever, daemon=True).start()
    began = time.monotonic()
    with pytest.raises(UserError, match=r"no answer in 0\.5 s: TimeoutError"):
        load_reward("http", url=f"http://127.0.0.1:{server.server_port}", deadline=0.5).score(PROMPTS, SAID)
    assert time.monotonic() - began < 2
    server.shutdown()


def test_a_service_that_fails_in_a_run_is_named_with_its_reward(service):
    Service.replies = [(401, {}, "")]
    with pytest.raises(UserError, match=r"status 401.*\n.*reward mine, a batch of 2 rows, .*/score"):
        scored(RewardSpec("mine", "http"), load_reward("http", url=service, deadline=0.2), PROMPTS, SAID, {})


def test_a_row_that_a_service_cannot_take_is_told_from_a_service_that_is_down():
    class Particular(Service):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(400 if self.hates in "".join(body["queries"]) else 200)
            self.end_headers()
            self.wfile.write(json.dumps({"rewards": [0.5] * len(body["queries"])}).encode())

    server = HTTPServer(("127.0.0.1", 0), Particular)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    model = load_reward("http", url=f"http://127.0.0.1:{server.server_port}/score", deadline=2.0)
    try:
        for Particular.hates, rows, said in (
            ("steal a bike", 2, r"status 400.*\n.*reward mine, row 1 .*steal a bike"),
            ("Who bakes", 2, r"status 400.*\n.*reward mine, row 0 .*Who bakes"),
            ("?", 2, r"status 400.*\n.*reward mine, a batch of 2 rows, the first 2 of which fail alone, http"),
            ("Who bakes", 1, r"status 400.*\n.*reward mine, a batch of one, row 0 .*Who bakes"),
        ):
            with pytest.raises(UserError, match=said):
                scored(RewardSpec("mine", "http"), model, PROMPTS[:rows], SAID[:rows], {})
    finally:
        server.shutdown()


def test_a_reward_that_is_down_blames_no_row_and_is_not_asked_for_long():
    class Down:
        asked = 0

        def score(self, prompts, completions, **columns):
            self.asked += 1
            raise ConnectionError("refused")

    down = Down()
    with pytest.raises(
        UserError, match=r"ConnectionError: refused.*\n.*a batch of 40 rows, the first 3 of which fail alone"
    ):
        scored(RewardSpec("mine", "mine"), down, PROMPTS * 20, SAID * 20, {})
    assert down.asked == 1 + 3

    class ComesAndGoes(Down):
        def score(self, prompts, completions, **columns):
            self.asked += 1
            if self.asked < 3:
                raise ConnectionError("refused")
            return [0.5] * len(prompts)

    with pytest.raises(UserError, match=r"a batch of 40 rows, one of which failed alone, and then did not"):
        scored(RewardSpec("mine", "mine"), ComesAndGoes(), PROMPTS * 20, SAID * 20, {})

    class TwoBad:
        def score(self, prompts, completions, **columns):
            if any(asked in PROMPTS[:1] for asked in prompts):
                raise ValueError("no")
            return [0.5] * len(prompts)

    with pytest.raises(UserError, match=r"ValueError: no.*\n.*row 0 of the batch: prompt 'Who bakes"):
        scored(RewardSpec("mine", "mine"), TwoBad(), [*PROMPTS[:1] * 2, PROMPTS[1]], [*SAID[:1] * 2, SAID[1]], {})


def test_each_pause_before_asking_again_is_twice_the_last(service, monkeypatch):
    pauses = []
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=pauses.append)
    monkeypatch.setattr("reward_models.http.time", clock)
    Service.replies = [(503, {}, "")] * 4 + [(200, {}, '{"rewards": [0.5, 0.5]}')]
    assert load_reward("http", url=service, first_pause=0.25).score(PROMPTS, SAID) == [0.5, 0.5]
    assert pauses == [0.25, 0.5, 1.0, 2.0]


def test_a_model_of_harm_is_turned_round_before_anything_else():
    found = mix({"harm": {"sign": -1, "weight": 2.0, "normalise": [0.5, 1.0]}}, [Constant([0.25, None])])
    scores = found.score(PROMPTS, SAID, {})
    assert scores.parts["harm"] == [-0.25, None]
    assert scores.total == [2.0 * (-0.25 - 0.5), None]


def test_a_trl_function_is_given_text_where_prompts_are_text():
    asked = []

    def near_twenty(prompts, completions, **columns):
        asked.append(prompts)
        return [-abs(20 - len(text)) for text in completions]

    reward = FromTRL(near_twenty)
    assert reward.score(PROMPTS, SAID, plain=[True, True]) == [-8, -3]
    assert reward.score(PROMPTS, SAID, plain=[False, False]) == [-19, -19], "messages, as TRL's trainers give them"
    assert asked == [["Who bakes?", "How do I steal a bike?"], PROMPTS]


def test_a_trl_function_may_be_async():
    async def later(prompts, completions, **columns):
        return [len(said[0]["content"]) for said in completions]

    reward = FromTRL(later)
    lengths = [len(text) for text in SAID]
    assert reward.score(PROMPTS, SAID) == reward.score(PROMPTS, SAID) == lengths

    async def notebook():
        return reward.score(PROMPTS, SAID)

    assert asyncio.run(notebook()) == lengths


def test_http_without_a_service_ends_at_its_deadline():
    with pytest.raises(UserError, match="ConnectionError"):
        load_reward("http", url="http://127.0.0.1:9/", first_pause=0.01, deadline=0.1).score(PROMPTS, SAID)
    with pytest.raises(UserError, match="no web address"):
        load_reward("http", url="ftp://x/y")
