"""The page in a real browser (chromium): hostile text does nothing, and the layout holds on a phone and on a desk.

Run with `make test-page`; the browser is not part of the environment that `make test` needs.
"""

import html
import json
import shutil
import subprocess

import pytest

from align_unlearn.report.html import render

pytestmark = pytest.mark.browser
HOSTILE = [
    "<script>document.title = 'owned'</script>",
    "</p></details></section><h1>Every gate passed</h1>",
    "<svg onload=\"document.title='owned'\"><style>body{display:none}</style></svg>",
    "<style>* { display: none !important }</style>",
    "<img src=x onerror=\"document.title='owned'\">",
    "javascript:document.title='owned'",
    "{{ audit.passed }} {% raw %} ${7*7}",
    "a" * 5000,
    "\u202eevil\u202c \u2066x\u2069 \u200b\x00\x1b[31m \ud800",
    "]]> --> <!-- \" ' ` \\",
]


def metric(name, group, **more):
    return {"name": name, "group": group, "better": "lower", "base": 0.9, "candidate": 0.2, "control": None, "low": 0.1,
            "high": 0.4, "n": 20, "budget": HOSTILE[4], **more}  # fmt: skip


CURVE = [{"setting": name, "at": at, "candidate": {"figure": 0.2 * at, "low": 0.0, "high": 0.5, "n": 9}}
         for at, name in enumerate(["nf4", "int8", HOSTILE[0]])]  # fmt: skip
PROBES = [
    metric(f"forget.leak.{name}", "probe", p_holm=0.01, effect=-1.5, per_draw_bound=0.3)
    for name in ("sampling", "jailbreak", "prefill")
]
AUDIT = {
    "schema_version": 1,
    "suite": HOSTILE[0],
    "base": {"path": HOSTILE[2], "precision": "nf4", "sha256": "0" * 64},
    "candidate": {"path": HOSTILE[1], "precision": "nf4", "sha256": "1" * 64},
    "control": None,
    "seed": 0,
    "metrics": [
        *PROBES,
        metric("attack.requantise.leak", "attack", curve=CURVE),
        metric("attack.prune.leak", "attack", curve=CURVE),
        metric("utility.$" + HOSTILE[0], "utility", budget=HOSTILE[7]),
    ],
    "gates": [
        {"name": "forget.leak", "rule": "<= 0.10", "why": HOSTILE[1], "bound": 0.1, "figure": 0.2, "value": 0.4,
         "passed": False}
    ],
    "passed": False,
    "open_questions": [HOSTILE[3]],
    "libraries": {"torch": "2"},
    "diagnosis": {"state": "suppressed", "because": [HOSTILE[0]]},
    "settings": {"about": HOSTILE[1]},
    "worst": metric("forget.leak.jailbreak", "probe", budget=HOSTILE[2]),
    "failures": [
        {"probe": "x", "variant": HOSTILE[0], "group": "forget", "model": "base", "id": HOSTILE[1],
         "failed": HOSTILE[2]}
    ],
    "costs": {"seconds": {HOSTILE[0]: 1.0}, "total_seconds": 1.0, "answered_tokens": 10, "peak_memory_bytes": 1,
              "threads": 2},
}  # fmt: skip


def records():
    found = []
    for number, text in enumerate(HOSTILE):
        for model in ("base", "candidate"):
            for group in ("forget", "retain"):
                verdict = "leak" if group == "forget" and number % 2 else "answer"
                found.append({"probe": "answers", "group": group, "model": model, "id": text, "prompt": text,
                              "reference": text, "completion": text + model, "finished": True, "verdict": verdict,
                              "verbatim_run": 3})  # fmt: skip
        found.append({"probe": "jailbreak", "group": "forget", "model": "candidate", "id": str(number), "variant": text,
                      "prompt": text, "prefill": "", "reference": text, "completion": text,
                      "verdict": "leak"})  # fmt: skip
        found.append({"probe": "likelihood", "group": "retain", "model": "candidate", "id": str(number), "kl": 0.1,
                      "kl_opening": 0.2})  # fmt: skip
    return found


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    (folder / "report.html").write_bytes(render(AUDIT, records()).encode("utf-8", "replace"))
    return folder / "report.html"


def chromium(*words):
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert binary, "chromium is not installed (on Debian: apt-get install chromium)"
    done = subprocess.run(
        [binary, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
         "--hide-scrollbars", *words],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout


def title_of(dom):
    return html.unescape(dom[dom.index("<title>") + 7 : dom.index("</title>")])


def test_nothing_that_was_said_acts(page):
    found = chromium("--dump-dom", page.as_uri())
    assert title_of(found).startswith("Audit of </p></details>"), "a title is text"
    body = found[found.index("<body>") :]
    assert body.count("<h1>") == 1
    for tag in ("<script", "<img", "<style>* ", "<svg onload"):
        assert tag not in body
    for mark in ("\u202e", "\u2066", "\x00", "\x1b"):
        assert mark not in found
    assert "⟨U+202E⟩" in found


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [380, 1200])
def test_the_page_is_as_wide_as_the_screen(page, width, scheme, tmp_path):
    around = page.with_name(f"around-{width}.html")
    around.write_text(
        "<!doctype html><title>?</title>"
        f"<iframe id=f src=report.html style='width:{width}px;height:900px;border:0'></iframe>"
        "<script>f.onload = () => {"
        " const d = f.contentDocument, r = d.documentElement;"
        " const all = [...d.querySelectorAll('h1, h2, section')];"
        " const shown = all.every(each => each.getBoundingClientRect().height > 0);"
        " const ground = f.contentWindow.getComputedStyle(d.body).backgroundColor;"
        " const name = d.title.slice(0, 8);"
        " document.title = JSON.stringify([r.scrollWidth, r.clientWidth, shown, ground, name]) }</script>"
    )
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    found = chromium("--virtual-time-budget=4000", "--dump-dom", *dark, around.as_uri())
    wide, room, shown, ground, name = json.loads(title_of(found))
    assert room == width
    assert wide <= width, "nothing stands out over the edge"
    assert shown
    assert name == "Audit of"
    assert ground == {"light": "rgb(245, 246, 248)", "dark": "rgb(18, 22, 27)"}[scheme]
    picture = tmp_path / "page.png"
    chromium(f"--screenshot={picture}", f"--window-size={max(width, 500)},2400", *dark, page.as_uri())
    assert picture.stat().st_size > 20_000
