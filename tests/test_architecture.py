"""The two halves meet in a protocol only, and imports run downward only."""

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for package in ("h2t_store", "estimators") for path in (ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """Modules of this project that the file imports, wherever the statement stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    known = {module_name(file) for file in FILES}
    return {name for name in names if name in known} - {module_name(path)}


@pytest.mark.parametrize(("package", "other"), [("h2t_store", "estimators"), ("estimators", "h2t_store")])
def test_the_halves_do_not_import_each_other(package, other):
    for path in FILES:
        if path.is_relative_to(ROOT / package):
            assert not any(name.split(".")[0] == other for name in imports(path)), path


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.name)
def test_benchmarks_import_what_is_there(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("h2t_store", "estimators"):
            module = importlib.import_module(node.module)
            missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            assert not missing or all(f"{node.module}.{name}" in known_modules() for name in missing), missing


def known_modules() -> set[str]:
    return {module_name(path) for path in FILES}


def test_private_helpers_of_scikit_learn_are_imported_in_one_file_only():
    def private(path: Path) -> list[str]:
        found = []
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sklearn":
                parts = [*node.module.split("."), *(alias.name for alias in node.names)]
                found += [part for part in parts if part.startswith("_")]
        return found

    assert [path.name for path in FILES if private(path)] == ["sklearn_private.py"]


def test_there_is_no_import_circle():
    graph = {module_name(path): imports(path) for path in FILES}
    graph["h2t_store"] = set()  # its exports are imported on first use
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above, name])
        if name in graph and name not in done:
            for imported in graph[name]:
                visit(imported, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())
    assert len(done) == len(graph)
