"""What pages say to make or change, made and changed."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from tests.helpers.docs_commands import ROOT, blocks


def write_question_set(folder: Path) -> None:
    """As the page says: the first block as own_test.json, the second as own_dev.json."""
    questions, shots = blocks("docs/extending.md", "json")
    (folder / "own_test.json").write_text(questions)
    (folder / "own_dev.json").write_text(shots)


def apply_diffs(page: str, root: Path) -> None:
    """Make the changes that the page's diffs show to the files below ``root``; each must fit in one place only."""
    for diff in blocks(page, "diff"):
        path = root
        for part in re.split(r"^(?=--- )|^@@\n", diff, flags=re.M):
            lines = part.splitlines()
            if lines and lines[0].startswith("--- "):
                path = root / lines.pop(0).removeprefix("--- ")
            if not lines:
                continue
            old = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("+"))
            new = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("-"))
            code = path.read_text(encoding="utf-8")
            assert code.count(old) == 1, f"{path.name} is not what {page} says it is:\n{old}"
            path.write_text(code.replace(old, new), encoding="utf-8")


def copy_of_the_code(folder: Path) -> Path:
    shutil.copytree(ROOT / "raylora", folder / "raylora", ignore=shutil.ignore_patterns("__pycache__"))
    return folder
