"""The layers of the package: who may import whom, and that the picture in docs/architecture.md shows it."""

import ast
import re
from pathlib import Path

import pytest
from conftest import REPOSITORY

BASE = {"job", "config", "errors"}
ALLOWED = {  # package → what it may import
    "errors": set(),
    "method": {"errors"},
    "config": {"errors"},
    "job": {"config", "errors"},
    "models": {"method", *BASE},
    "data": {"models", "method", *BASE},
    "training": {"data", "models", "method", *BASE},
    "measure": {"data", "models", "method", *BASE},
    "report": {"measure", "data", "models", "method", *BASE},
    "analysis": {"report", "measure", "data", "models", "method", *BASE},
    "search": {"analysis", "measure", "data", "models", "method", *BASE},
    "compare": {"report", "measure", "models", *BASE},
}
SCRIPTS = {path.stem for path in REPOSITORY.glob("*.py")}


def imports(path: Path) -> set[str]:
    """The modules that a file imports, anywhere in it."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0}


def packages() -> dict[str, set[str]]:
    """Package (or module directly below deme) → those that it imports."""
    found: dict[str, set[str]] = {}
    for path in (REPOSITORY / "deme").rglob("*.py"):
        parts = path.relative_to(REPOSITORY / "deme").with_suffix("").parts
        modules = {name.split(".")[1] for name in imports(path) if name.startswith("deme.")}
        found.setdefault(parts[0], set()).update(modules)
    return {name: modules - {name} for name, modules in found.items() if name != "__init__"}


@pytest.mark.parametrize("package", ALLOWED)
def test_no_layer_imports_one_above_it(package):
    assert packages()[package] <= ALLOWED[package]


def test_every_package_has_its_layer():
    assert packages().keys() - {"projection"} == ALLOWED.keys()


def test_nothing_imports_an_entry_script():
    for path in (REPOSITORY / "deme").rglob("*.py"):
        assert imports(path) & SCRIPTS == set(), path


def test_accelerate_is_known_to_training_and_its_processes_alone():
    for path in (REPOSITORY / "deme").rglob("*.py"):
        if path.parent.name != "training" and path.name != "processes.py":
            assert not any(name.split(".")[0] == "accelerate" for name in imports(path)), path


@pytest.mark.parametrize(("pattern", "most"), [("*.py", 60), ("deme/**/*.py", 50)])
def test_functions_and_files_stay_short(pattern, most):
    """An entry script's main and every function of the package fit on a screen."""
    for path in REPOSITORY.glob(pattern):
        text = path.read_text()
        assert text.count("\n") <= 330, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < most, f"{path}: {node.name}"


def test_modules_import_each_other_in_no_circle():
    """File by file, in whichever function an import stands, also for types alone."""
    graph = {}
    for path in (REPOSITORY / "deme").rglob("*.py"):
        module = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
        graph[module] = {name for name in imports(path) if name.startswith("deme.")}
    while graph:
        free = [module for module, needed in graph.items() if not needed & graph.keys()]
        assert free, f"a circle among {sorted(graph)}"
        for module in free:
            del graph[module]


def test_the_picture_of_the_architecture_is_true():
    """Its arrows between packages are the imports that exist."""
    text = (REPOSITORY / "docs" / "architecture.md").read_text()
    picture = re.search(r"```mermaid\n(.*?)```", text, re.DOTALL)[1]
    names = "|".join(ALLOWED)
    drawn = set()
    for line in picture.splitlines():
        arrow = re.fullmatch(rf"\s*({names})\s*-->\s*(.+)", line)
        if arrow:
            drawn |= {(arrow[1], target.strip()) for target in arrow[2].split("&")}
    real = {(package, target) for package in ALLOWED for target in packages()[package] & ALLOWED.keys()}
    assert drawn == {(package, target) for package, target in real if target != "errors"}
