"""Files that are there whole or not at all: written under a temporary name, then renamed."""

from __future__ import annotations

import json
import math
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

PARTIAL = ".partial-"


def to_json(value: Any) -> str:
    """A value as JSON text. NaN and infinity, which JSON does not have, become null."""
    return json.dumps(_finite_json(value), ensure_ascii=False, indent=1, default=str)


def _finite_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _finite_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite_json(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def partial_of(path: Path) -> Path:
    """A temporary name in the folder of ``path``. The next run deletes what a killed one left (``Store.open``)."""
    return path.with_name(f"{PARTIAL}{uuid.uuid4().hex}-{path.name}")


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Have ``write`` make a file or folder under a temporary name beside ``path``, then rename it to ``path``.

    Raises:
        OSError: it cannot be written; ``path`` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    try:
        write(partial)
        if partial.is_dir() and path.is_dir():
            # A folder cannot be renamed over one that holds files. A kill right after this leaves none, never a half.
            shutil.rmtree(path)
        partial.replace(path)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """``write_atomically`` of text in UTF-8."""

    def write(partial: Path) -> None:
        partial.write_text(text, encoding="utf-8")

    write_atomically(path, write)


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is no such file, it cannot be read, or it holds none."""
    try:
        return parse_json(path.read_bytes())
    except OSError:
        return None


def parse_json(data: bytes) -> dict[str, Any] | None:
    """The JSON object that ``data`` is; None if it is none."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):  # RecursionError: nested too deeply to be anything of ours
        return None
    return value if isinstance(value, dict) else None
