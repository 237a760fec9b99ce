"""The report opened in headless Chromium from disk: plots drawn, a silent console, no page wider than its window."""

import json
import os
import shutil
import subprocess

import pytest
from recorded_runs import write_two_phases

from megacl.report import render_report

pytestmark = pytest.mark.long

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)

# Runs inside the page, after the report's own script, and writes what it finds into the frame's parent.
PROBE = """
<script>
addEventListener("load", () => setTimeout(() => parent.postMessage(JSON.stringify({
  window: innerWidth,
  page: document.documentElement.scrollWidth,
  plots: [...document.querySelectorAll("[data-figure]")].map((plot) => ({
    name: plot.dataset.figure,
    curves: plot.querySelectorAll(".scatterlayer .trace").length,
    width: plot.querySelector(".main-svg").getBoundingClientRect().width,
    room: plot.getBoundingClientRect().width,
    texts: [...plot.querySelectorAll(".annotation-text")].map((text) => text.textContent),
  })),
  boxes: [...document.querySelectorAll(".scroll")].map((box) => box.getBoundingClientRect().right),
}), "*"), 500));
</script>
"""

# A window of Chromium cannot be as narrow as a phone, a frame can.
FRAME = """<!DOCTYPE html><body style="margin: 0">
<iframe src="report.html" width="{width}" height="900" style="border: 0"></iframe><pre id="found"></pre>
<script>addEventListener("message", (event) => {{ found.textContent = event.data; }});</script></body>"""


@pytest.fixture(scope="module")
def browser() -> str:
    if BROWSER is None:
        why = "needs Chromium: apt-get install chromium, or put chromium or google-chrome on the PATH"
        pytest.fail(why) if os.environ.get("CI") else pytest.skip(why)
    return BROWSER


def opened(browser, folder, page: str, width: int) -> tuple[dict, str]:
    """What the probe found in a page in a frame `width` wide, and what the browser's console said."""
    (folder / "report.html").write_text(page.replace("</body>", f"{PROBE}</body>"))
    (folder / "frame.html").write_text(FRAME.format(width=width))
    done = subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--no-first-run",
            "--disable-background-networking",
            "--enable-logging=stderr",
            "--virtual-time-budget=10000",
            f"--user-data-dir={folder / 'profile'}",
            f"--window-size={max(width, 500)},900",
            "--dump-dom",
            (folder / "frame.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = done.stdout.split('<pre id="found">')[1].split("</pre>")[0]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert found, f"the probe did not answer: {done.stderr[-2000:]}"
    return json.loads(found), "\n".join(console)


@pytest.mark.parametrize("width", [1280, 390])
def test_the_plots_are_drawn_and_the_page_fits_its_window(browser, tmp_path, width):
    page = render_report([write_two_phases(tmp_path / "english-then-german")])
    found, console = opened(browser, tmp_path, page, width)
    assert console == ""
    assert found["window"] == width
    assert found["page"] == width
    assert max(found["boxes"]) <= width
    curves = {plot["name"]: plot["curves"] for plot in found["plots"]}
    assert curves == {
        "figure-loss": 3,
        "figure-lr": 1,
        "figure-tokens_per_second": 1,
        "figure-grad_norm": 1,
    }
    for plot in found["plots"]:
        assert plot["width"] == pytest.approx(plot["room"], abs=1)
        assert plot["texts"] == ["english", "german"]


def test_several_runs_with_long_names_fit_a_phone(browser, tmp_path):
    runs = [write_two_phases(tmp_path / f"{'averyveryverylongname' * 3}-{number}") for number in range(3)]
    found, console = opened(browser, tmp_path, render_report(runs), 390)
    assert console == ""
    assert found["page"] == 390
    assert {plot["name"]: plot["curves"] for plot in found["plots"]}["figure-loss"] == 9


def test_a_page_that_breaks_the_rules_is_noticed(browser, tmp_path):
    page = render_report([write_two_phases(tmp_path / "run")])
    broken = page.replace(
        "</main>",
        '<img src="https://example.org/x.png"><div style="width: 3000px">x</div><script>nothing()</script></main>',
    )
    found, console = opened(browser, tmp_path, broken, 390)
    assert found["page"] >= 3000
    assert "Content Security Policy" in console
    assert "nothing is not defined" in console
