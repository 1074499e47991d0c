"""The house rules: floors, package mapping, exports, no second copy of a package."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import lmh

ROOT = Path(__file__).parent.parent
FLOORS = {"lmh": 0, "calibrate": 1, "zoo": 1, "convert": 2, "finetune": 3}
SOURCES = [path for folder in FLOORS for path in sorted((ROOT / folder).rglob("*.py"))]
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def imported_folders(path: Path) -> set[str]:
    """Folders that a file imports from, by its relative imports and by absolute ones of ``lmh``."""
    folder = path.relative_to(ROOT).parts[0]
    depth = len(path.relative_to(ROOT).parts) - 1
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.level:
            above = node.level - (depth if folder != "lmh" else depth - 1)
            if folder == "lmh" or above >= 1:
                names = [f"lmh.{node.module}" if node.module else f"lmh.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "lmh":
                found.add(parts[1] if len(parts) > 1 and parts[1] in FLOORS else "lmh")
    return found - {folder}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    if "cli" in path.stem or path.name == "__main__.py":
        assert imported_folders(path) <= FLOORS.keys()
        return
    above = {other for other in imported_folders(path) if FLOORS[other] >= FLOORS[folder]}
    assert not above, f"{path.name} on floor {FLOORS[folder]} imports {above}"


def test_the_floors_test_sees_imports() -> None:
    assert imported_folders(ROOT / "convert" / "pipeline.py") == {"lmh", "calibrate"}
    assert imported_folders(ROOT / "finetune" / "trainer.py") == {"lmh"}
    assert "zoo" in imported_folders(ROOT / "convert" / "loading.py")


@pytest.mark.parametrize("name", ["convert", "calibrate", "finetune", "zoo"])
def test_no_folder_is_imported_bare(name: str) -> None:
    for package in FLOORS:
        importlib.import_module("lmh" if package == "lmh" else f"lmh.{package}")
    assert name not in sys.modules
    bare = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True)
    assert bare.returncode != 0
    assert "ImportError" in bare.stderr or "ModuleNotFoundError" in bare.stderr


def test_every_public_name_is_there() -> None:
    for name in lmh.__all__:
        assert getattr(lmh, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'; it has"):
        _ = lmh.nonsense


@pytest.mark.parametrize("package", ["lmh.convert", "lmh.calibrate", "lmh.finetune", "lmh.zoo"])
def test_every_exported_name_has_a_docstring(package: str) -> None:
    module = importlib.import_module(package)
    for name in module.__all__:
        value = getattr(module, name)
        assert name.isupper() or (value.__doc__ and len(value.__doc__) > 20), f"{package}.{name}"


def test_help_does_not_import_torch() -> None:
    code = "import sys; from lmh.cli import lmh, run; run(lmh, ['--help']); print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert "zoo" in shown
    assert shown.endswith("False\n")


def test_files_stay_short() -> None:
    long = {path.name: len(path.read_text().splitlines()) for path in [*SOURCES, *TESTS]}
    assert {name: length for name, length in long.items() if length > 400} == {}
