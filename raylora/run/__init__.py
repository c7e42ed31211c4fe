"""A run of a plan: what is left of it, its tables, its end. As a function, ``raylora.run("folder", model=...)``."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Unpack

if TYPE_CHECKING:
    from raylora.config.keywords import FolderKeywords
    from raylora.run.from_python import Run


class _CallablePackage(ModuleType):
    """``raylora.run`` is this package, however and in whatever order it is imported; and it can be called."""

    def __call__(self, folder: str | Path, **options: Unpack[FolderKeywords]) -> Run:
        """See ``raylora.run.from_python.run``."""
        from raylora.run.from_python import run  # imports torch: the commands import this package without it

        return run(folder, **options)


sys.modules[__name__].__class__ = _CallablePackage
