"""The wheel: every package and data file is in it, and it works installed outside the repository."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "lmh": "lmh",
    "lmh/convert": "convert",
    "lmh/calibrate": "calibrate",
    "lmh/finetune": "finetune",
    "lmh/zoo": "zoo",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    source = out / "source"
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in tracked.stdout.split():
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(source)], check=True, capture_output=True
    )
    (built,) = out.glob("*.whl")
    return built


def test_every_file_of_every_folder_is_in_the_wheel(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert f"{package}/{path.relative_to(ROOT / folder)}" in names


@pytest.mark.slow
def test_it_converts_in_a_new_environment_outside_the_repository(wheel: Path, tmp_path: Path) -> None:
    """The new environment sees this one's libraries (torch is large) but not this one's ``lmh``."""
    environment = tmp_path / "env"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)], check=True, capture_output=True
    )
    (site,) = environment.glob("lib/python*/site-packages")
    (here,) = (Path(path) for path in sys.path if path.endswith("site-packages"))
    (site / "libraries.pth").write_text(f"{here}\n")
    command = environment / "bin" / "lmh-convert"
    arguments = ["zoo:digits-cnn", "--timesteps", "4", "--data", "digits", "--json"]
    plain = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run([command, *arguments], cwd=tmp_path, env=plain, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["ann_accuracy"] > 0.99
    assert (tmp_path / result["output"]).is_file()
    images = np.zeros((20, 32, 32, 3), np.uint8)
    np.savez(
        tmp_path / "cifar.npz", x_train=images, y_train=np.arange(20) % 10, x_test=images, y_test=np.arange(20) % 10
    )
    lmh = environment / "bin" / "lmh"
    for words, wanted in (
        ([lmh, "zoo", "list"], "model cifar10-resnet20: "),
        ([command, "zoo:cifar10-resnet20", "--timesteps", "4", "--data", "npz:cifar.npz"], "T = 4"),
    ):
        done = subprocess.run(words, cwd=tmp_path, env=plain, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert wanted in done.stdout
    where = subprocess.run(
        [python, "-c", "import lmh; print(lmh.__file__)"], cwd=tmp_path, env=plain, capture_output=True, text=True
    )
    assert str(environment) in where.stdout
