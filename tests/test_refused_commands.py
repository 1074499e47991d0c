"""What a newcomer typed on purpose that cannot work: refused early, in a sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from commands import command
from lmh import zoo


@pytest.mark.parametrize("name", ["zoo:cifar10-resnet20", "net.pt"])
def test_a_teacher_of_other_inputs_or_outputs_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(zoo.card("digits-cnn").build(num_classes=7).state_dict(), "net.pt")
    refused = command("finetune", "zoo:digits-cnn", "-T", 1, "--data", "digits", "--teacher", name, "--epochs", 1)
    assert refused.status == 2
    words = "has 7 outputs and the network 10" if name == "net.pt" else "cannot take what the network takes, [1, 8, 8]"
    assert words in " ".join(refused.err.split())


def test_an_hdf5_file_is_a_nir_graph_only_with_nodes(tmp_path: Path) -> None:
    for content, words in ((b"model_weights", "an HDF5 file, as Keras writes"), (b"nodes edges", "cannot be read")):
        (tmp_path / "model.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + content)
        assert words in command("inspect", tmp_path / "model.h5").err


def test_a_recipe_of_cifar10_wants_its_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    x, y = np.zeros((6, 32, 32, 3), np.uint8), np.arange(6) % 3
    np.savez("three.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    refused = command("zoo", "train", "cifar10-resnet20", "--data", "npz:three.npz", "--out", "out")
    assert "has 3 classes; expected the 10 of cifar10" in " ".join(refused.err.split())
