"""Files that are there whole or not at all."""

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
    """JSON text; what JSON does not know (NaN, infinity) becomes null."""
    return json.dumps(_finite_json(value), ensure_ascii=False, indent=1, default=str)


def _finite_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _finite_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite_json(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def partial_of(path: Path) -> Path:
    """A temporary name beside ``path``; what is left under one is thrown away by the next run."""
    return path.with_name(f"{PARTIAL}{uuid.uuid4().hex}-{path.name}")


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """``write`` makes a file or folder under a temporary name beside ``path``, which then takes its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    try:
        write(partial)
        if partial.is_dir() and path.is_dir():
            shutil.rmtree(path)  # a folder cannot be renamed over one that holds files
        partial.replace(path)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    def write(partial: Path) -> None:
        partial.write_text(text, encoding="utf-8")

    write_atomically(path, write)


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object that was written here; None where there is none, or none that can be read."""
    try:
        return parse_json(path.read_bytes())
    except OSError:
        return None


def parse_json(data: bytes) -> dict[str, Any] | None:
    """A JSON object; None where it is none."""
    try:
        value = json.loads(data)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
