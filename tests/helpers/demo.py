"""README's example of output and its picture, from a run of the demo.

python -m tests.helpers.demo            # runs it, some four minutes on two idle cores
python -m tests.helpers.demo results/chunk_demo    # of a run that is there
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from raylora.planning.plan import DEMO_CHUNK
from raylora.records import ResultRow
from raylora.report.terminal import print_results
from raylora.storage.store import Store
from tests.helpers import ROOT
from tests.helpers.chromium import CHROMIUM, FLAGS

CONFIG = ROOT / "configs" / "demo.yaml"
README = ROOT / "README.md"
PICTURE = ROOT / "docs" / "report.png"
OPENING = "The demo ends so:\n\n"
WIDTH = 98
"""Characters in a line of the example: the names of the datasets are whole, and there is room for p(right)."""
SIZE = {"width": 1280, "height": 1620}
"""Of the picture, in CSS pixels: the page from its head to its first figures."""


def printed(root: Path) -> str:
    """What a run printed at its end, without its title, the rule below the heads, and the list of its files."""
    rows = [ResultRow(json.loads(p.read_text())["row"]) for p in sorted(root.glob("experiments/*/result.json"))]
    shown = io.StringIO()
    print_results(rows, Store(root), Console(file=shown, width=WIDTH))
    lines = [line.rstrip() for line in shown.getvalue().partition("\n")[2].splitlines() if "───" not in line]
    text = "\n".join(lines).partition("  results.csv,")[0]
    text = re.sub(r"Files: .*", f"Files: results/{DEMO_CHUNK}", text)
    return re.sub(r"\n{2,}", "\n\n", text).strip("\n")


def put_into(page: str, text: str) -> str:
    """``page`` with ``text`` as the indented block behind ``OPENING``."""
    before, opening, after = page.partition(OPENING)
    rest = re.sub(r"\A(    .*\n|\n(?=    ))*", "", after)
    block = "".join(f"    {line}".rstrip() + "\n" for line in text.splitlines())
    return before + opening + block + rest


def take_picture(page: Path, path: Path) -> None:
    """A screenshot of a report's first ``SIZE`` pixels."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        view = browser.new_page(viewport=SIZE, color_scheme="light")
        view.goto(page.as_uri())
        view.wait_for_selector("html[data-drawn]")
        view.screenshot(path=path)
        browser.close()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else Path(folder) / DEMO_CHUNK
        if not root.is_dir():
            command = [sys.executable, "-m", "raylora.batch", "--config", str(CONFIG), "--output", folder]
            subprocess.run(command, check=True)
        README.write_text(put_into(README.read_text(encoding="utf-8"), printed(root)), encoding="utf-8")
        take_picture(root / "report.html", PICTURE)


if __name__ == "__main__":
    main()
