"""Each wing imports only from those below it, and no modules import each other in a circle, lazy imports counted."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "raylora"
LAYERS = (
    ("batch", "rank"),
    ("commands",),
    ("api",),
    ("run",),
    ("cluster",),
    ("planning",),
    ("experiment",),
    ("report", "predict"),
    ("features",),
    ("mmlu",),
    ("training",),
    ("model",),
    ("data",),
    ("rows",),
    ("config",),
    ("storage",),
    ("records",),
    ("errors", "console", "work_counts"),
    ("texts",),
)
"""From the top to the ground. The options stand on ``storage``, as places are a type of option."""
LEVEL = {wing: level for level, wings in enumerate(reversed(LAYERS)) for wing in wings}
ROOT_FILES = {"__init__.py", "py.typed"}


def imports_of(path: Path, package: Path) -> Iterator[tuple[int, str]]:
    """Line and module, such as ``raylora.model.loading``, of every import of the package's own modules."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] != "raylora":
                continue
            while parts and not is_module(package, parts[1:]):
                parts.pop()
            yield node.lineno, ".".join(parts)


def is_module(package: Path, parts: list[str]) -> bool:
    file = package.joinpath(*parts)
    return file.with_suffix(".py").is_file() or (file / "__init__.py").is_file()


def module_of(path: Path, package: Path) -> str:
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(("raylora", *(p for p in parts if p != "__init__")))


def upward_imports(package: Path) -> list[str]:
    found = []
    for path in sorted(package.rglob("*.py")):
        wing, name = path.relative_to(package).with_suffix("").parts[0], path.name
        if wing == "__init__":
            continue
        level = LEVEL["batch"] if name == "__main__.py" else LEVEL[wing]  # three lines that call a command
        for line, module in imports_of(path, package):
            target = module.split(".")[1] if "." in module else ""
            if target and (LEVEL[target] > level or (LEVEL[target] == level and target != wing)):
                found.append(f"{path.relative_to(package.parent)}:{line}: {wing} imports {module}, which is above it")
    return found


def circles(package: Path) -> list[list[str]]:
    """Groups of modules that reach each other (Tarjan 1972 by way of two searches)."""
    edges = {
        module_of(path, package): {m for _, m in imports_of(path, package)} - {module_of(path, package)}
        for path in package.rglob("*.py")
        if path != package / "__init__.py"  # it names all that is public, for type checkers, and imports nothing itself
    }

    def reached(start: str) -> set[str]:
        seen, todo = set(), [start]
        while todo:
            for module in edges.get(todo.pop(), ()):
                if module not in seen:
                    seen.add(module)
                    todo.append(module)
        return seen

    reach = {module: reached(module) for module in edges}
    groups = {frozenset(m for m in reach if m in reach[start] and start in reach[m]) for start in reach}
    return sorted(sorted(group) for group in groups if group)


def test_every_wing_imports_only_from_those_below_it():
    assert upward_imports(PACKAGE) == []


def test_no_modules_import_each_other_in_a_circle():
    assert circles(PACKAGE) == []


def test_the_root_has_the_wings_and_a_few_small_files():
    entries = {p.name for p in PACKAGE.iterdir() if p.name != "__pycache__"} - ROOT_FILES
    assert len(entries) <= 24
    assert {name.removesuffix(".py") for name in entries} - {"demo"} == set(LEVEL)


@pytest.mark.parametrize(
    ("file", "line", "says"),
    [
        ("storage/store.py", "from raylora.cluster import worker", "storage imports raylora.cluster.worker"),
        ("errors.py", "def f():\n    from raylora.records import digest", "errors imports raylora.records"),
        ("console.py", "import raylora.errors", "console imports raylora.errors"),
        ("mmlu/scoring.py", "from raylora import features", "mmlu imports raylora.features"),
    ],
)
def test_a_planted_upward_import_is_found(tmp_path, file, line, says):
    package = tmp_path / "raylora"
    for path in PACKAGE.rglob("*.py"):
        copy = package / path.relative_to(PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    planted = package / file
    planted.write_text(planted.read_text(encoding="utf-8") + "\n" + line + "\n", encoding="utf-8")
    assert [says in text for text in upward_imports(package)] == [True]


def test_a_planted_circle_is_found(tmp_path):
    package = tmp_path / "raylora" / "data"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "one.py").write_text("from raylora.data.two import b\n")
    (package / "two.py").write_text("def f():\n    from raylora.data import one\n")
    assert circles(package.parent) == [["raylora.data.one", "raylora.data.two"]]
