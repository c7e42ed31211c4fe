"""Tests stand beside the module that they test, and use of it what everybody may use."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import ROOT

TESTS = ROOT / "tests"
WITHOUT_A_MODULE = {
    "test_layers": "the whole package: what imports what",
    "test_layout": "the tests themselves",
    "mmlu/test_parity": "the whole wing, beside lm-evaluation-harness",
    "report/test_browser": "the page as a browser shows it",
}
OF_THE_WHOLE = {"faults", "whole"}
"""Folders of tests that look at no single module: real runs, the documentation, what is killed."""


def files_without_a_module(tests: Path, package: Path) -> list[str]:
    """Test files that name no module, and are none of those that need not."""
    names = [path.relative_to(tests) for path in sorted(tests.rglob("test_*.py"))]
    return [
        str(name)
        for name in names
        if name.parts[0] not in OF_THE_WHOLE
        and str(name.with_suffix("")) not in WITHOUT_A_MODULE
        and not (package / name.parent / name.name.removeprefix("test_")).is_file()
    ]


def is_private(name: str) -> bool:
    """``_repr_html_`` and such are names that notebooks call."""
    return name.startswith("_") and not name.startswith("__") and not name.endswith("_") and name[1:].isidentifier()


def private_names_of(package: Path) -> set[str]:
    """Functions, classes, constants, fields and attributes that the package means for itself."""
    names: set[str] = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
                names.add(node.attr)
    return {name for name in names if is_private(name)}


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in {"self", "cls"}


def names_used(path: Path) -> Iterator[tuple[int, str]]:
    """Line and name: attributes of something other than ``self``, imported names, and those that setattr is given."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and not is_self(node.value):
            yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("setattr", "getattr", "delattr")):
            yield from ((node.lineno, str(a.value)) for a in node.args if isinstance(a, ast.Constant))


def private_uses(root: Path) -> list[str]:
    private = private_names_of(root / "raylora")
    found = []
    for path in sorted([*(root / "tests").rglob("*.py"), *(root / "benchmarks").rglob("*.py")]):
        name = path.relative_to(root).as_posix()
        found += [f"{name}:{line}: {used}" for line, used in names_used(path) if used in private]
    return found


def imports_of_tests(tests: Path) -> list[str]:
    """Test files that other files take something from."""
    found = []
    for path in sorted(tests.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found += [f"{path.relative_to(tests)}: {m}" for m in modules if m.rpartition(".")[2].startswith("test_")]
    return found


def test_every_test_file_names_the_module_that_it_tests():
    assert files_without_a_module(TESTS, ROOT / "raylora") == []


def test_what_needs_no_module_is_there():
    assert [name for name in WITHOUT_A_MODULE if not (TESTS / f"{name}.py").is_file()] == []


def test_what_several_files_need_is_in_no_test_file():
    assert imports_of_tests(TESTS) == []


def test_tests_and_benchmarks_use_nothing_private():
    assert private_uses(ROOT) == []


@pytest.mark.parametrize(
    ("line", "used"),
    [
        ("thing._secret()", "_secret"),
        ("from raylora.module import _helper", "_helper"),
        ("import raylora.module as m; m._LIMIT = 3", "_LIMIT"),
        ("monkeypatch.setattr(thing, '_state', None)", "_state"),
        ("thing.open(); other._of_somebody_else", None),
        ("class A:\n    def f(self): self._secret", None),
    ],
)
def test_a_planted_private_use_is_found(tmp_path, line, used):
    for folder in ("raylora", "tests", "benchmarks"):
        (tmp_path / folder).mkdir()
    module = "_LIMIT = 1\ndef _helper(): pass\nclass Thing:\n    def _secret(self): self._state = 1\n"
    (tmp_path / "raylora" / "module.py").write_text(module)
    (tmp_path / "tests" / "test_module.py").write_text(line)
    assert private_uses(tmp_path) == ([f"tests/test_module.py:1: {used}"] if used else [])


def test_a_planted_test_file_without_a_module_is_found(tmp_path):
    for name in ("raylora/wing/there", "tests/wing/test_there", "tests/wing/test_gone", "tests/whole/test_all"):
        file = tmp_path / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    assert files_without_a_module(tmp_path / "tests", tmp_path / "raylora") == ["wing/test_gone.py"]
