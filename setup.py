"""Map the repository's folders onto the package ``lmh``; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

FOLDERS = {
    "lmh": "lmh",
    "lmh.convert": "convert",
    "lmh.calibrate": "calibrate",
    "lmh.finetune": "finetune",
    "lmh.zoo": "zoo",
}

setup(
    packages=[
        name
        for package, folder in FOLDERS.items()
        for name in [package, *(f"{package}.{sub}" for sub in find_packages(folder))]
    ],
    package_dir=FOLDERS,
    package_data={"lmh": ["py.typed", "arena.cpp", "report/*.jinja"], "lmh.zoo": ["recipes/*.toml", "weights/*"]},
)
