"""The examples of all docstrings run, and every public function has one."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"lmh": "lmh", "lmh.convert": "convert", "lmh.calibrate": "calibrate", "lmh.finetune": "finetune",
           "lmh.zoo": "zoo"}  # fmt: skip
EXTRAS = {"nir", "onnxruntime", "tonic"}


def library_files() -> dict[str, Path]:
    """Every module of the installed package and its file, commands left out."""
    found = {}
    for package, folder in FOLDERS.items():
        module = importlib.import_module(package)
        assert [Path(path) for path in module.__path__] == [ROOT / folder]
        found[package] = ROOT / folder / "__init__.py"
        for info in pkgutil.walk_packages(module.__path__, f"{package}."):
            last = info.name.rpartition(".")[2]
            if "cli" not in last and last != "__main__":
                spec = info.module_finder.find_spec(info.name, None)
                assert spec is not None
                assert spec.origin is not None
                found[info.name] = Path(spec.origin)
    return found


FILES = library_files()
WITH_EXAMPLES = [name for name, path in FILES.items() if ">>>" in path.read_text()]


def test_the_walk_finds_every_source_file() -> None:
    sources = {path for folder in FOLDERS.values() for path in (ROOT / folder).rglob("*.py")}
    library = {path for path in sources if "cli" not in path.stem and path.name != "__main__.py"}
    assert set(FILES.values()) == library


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_the_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        pytest.skip(f"needs the extra that brings {error.name}")
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0, "the report is in the captured output"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", FOLDERS)
def test_every_public_function_has_an_example(package: str) -> None:
    module = importlib.import_module(package)
    public = {name: getattr(module, name) for name in module.__all__}
    functions = {name: value for name, value in public.items() if inspect.isfunction(value)}
    assert functions
    without = [name for name, value in functions.items() if ">>>" not in (value.__doc__ or "")]
    assert without == []


def test_the_examples_test_sees_a_wrong_one() -> None:
    class Module:
        """A module with an example that is wrong.

        >>> 1 + 1
        3
        """

    [found] = doctest.DocTestFinder().find(Module, "wrong")
    assert doctest.DocTestRunner(verbose=False).run(found, out=lambda _text: None).failed == 1
