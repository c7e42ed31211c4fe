"""How long the report takes to write, and how smooth its page is in a browser.

    python -m benchmarks.report --datasets 40 500 --questions 5

Needs Chromium and playwright. Times are of the whole way: a click until the frame that shows what it did.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from raylora.mmlu.questions import SUBJECT_GROUPS
from raylora.report.page import write_report
from tests.helpers.runs import dataset_names, write_run

# Milliseconds from a call until two frames later, when what it changed has been painted.
PAINTED = """(act) => new Promise((done) => {
  const start = performance.now();
  act();
  requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - start)));
})"""
CLICKS = {
    "sort the ranking": "() => document.querySelectorAll('#ranking thead button')[1].click()",
    "search the ranking": "() => { const s = document.querySelector('#ranking input'); s.value = 'dolly'; "
    "s.dispatchEvent(new Event('input')); }",
    "sort all columns": "() => document.querySelectorAll('#table thead button')[3].click()",
    "choose a dataset": "() => document.querySelector('#ranking tr.row').click()",
    "light and dark": "() => document.getElementById('theme').click()",
}
# The longest gap between frames while a box scrolls from top to bottom in 60 frames.
SCROLL = """(selector) => new Promise((done) => {
  const box = document.querySelector(selector);
  const gaps = [];
  let [frame, last] = [0, performance.now()];
  const step = (now) => {
    gaps.push(now - last);
    last = now;
    if (frame++ === 60) return done(Math.max(...gaps.slice(1)));
    box.scrollTop = (box.scrollHeight - box.clientHeight) * frame / 60;
    requestAnimationFrame(step);
  };
  requestAnimationFrame(step);
})"""


def measure(num: int, num_questions: int, browser: Any, folder: Path) -> dict[str, float]:
    root = folder / f"chunk_{num}"
    write_run(root, dataset_names(num), sizes=dict.fromkeys(SUBJECT_GROUPS, num_questions))
    started = time.perf_counter()
    path = write_report(root)
    found = {"write, s": time.perf_counter() - started, "page, MB": path.stat().st_size / 1e6}
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    started = time.perf_counter()
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-drawn]")
    found["load and draw, ms"] = 1000 * (time.perf_counter() - started)
    found["elements"] = page.evaluate("document.querySelectorAll('*').length")
    for name, act in CLICKS.items():
        found[f"{name}, ms"] = page.evaluate(f"({PAINTED})({act})")
    for name, selector in {"ranking": "#ranking .vt", "heat map": ".heat", "all columns": "#table .vt"}.items():
        page.locator(selector).scroll_into_view_if_needed()
        found[f"scroll the {name}: longest frame, ms"] = page.evaluate(SCROLL, selector)
    page.close()
    return found


def main() -> None:
    from playwright.sync_api import sync_playwright

    from tests.helpers.chromium import CHROMIUM, FLAGS

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--datasets", type=int, nargs="+", default=[40, 500])
    parser.add_argument("--questions", type=int, default=5, help="of each of the 57 subjects")
    options = parser.parse_args()
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        found = {num: measure(num, options.questions, browser, Path(folder)) for num in options.datasets}
        browser.close()
    print(f"| | {' | '.join(f'{num} datasets' for num in found)} |\n| --- |{' --- |' * len(found)}")
    for name in next(iter(found.values())):
        print(f"| {name} | {' | '.join(f'{values[name]:,.3g}' for values in found.values())} |")


if __name__ == "__main__":
    main()
