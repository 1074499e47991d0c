"""A network of your own, with an activation that nobody has a rule for.

    python examples/own_activation.py

Squareplus, (x + √(x² + b)) / 2, is a smooth ReLU. Conversion refuses it, and says where it stands; a rule lets neurons
stand in for it. They give a clipped ReLU, which is not quite the same, so the network is trained for a few epochs.
Prints the refusal and the accuracies.
"""

from __future__ import annotations

import click
import torch
from torch import Tensor, nn

from lmh import evaluate, zoo
from lmh.convert import as_neuron, convert
from lmh.errors import AuditError
from lmh.finetune import Schedule, finetune


class Squareplus(nn.Module):
    """(x + √(x² + b)) / 2 (Barron 2021)."""

    def __init__(self, b: float = 0.2) -> None:
        super().__init__()
        self.b = b

    def forward(self, x: Tensor) -> Tensor:
        """Return it for each value."""
        return (x + (x * x + self.b).sqrt()) / 2


class Residual(nn.Module):
    """A small residual network for 8×8 digits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), Squareplus())
        self.body = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), Squareplus(),
                                  nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16))  # fmt: skip
        self.activation = Squareplus()
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, [N, 10]."""
        x = self.stem(x)
        x = self.activation(x + self.body(x))
        return self.head(x.mean((2, 3)))


@click.command()
@click.option("--epochs", default=10, show_default=True, help="Of the network.")
@click.option("--tune", default=3, show_default=True, help="Epochs of the spiking network.")
@click.option("--timesteps", default=4, show_default=True)
def main(epochs: int, tune: int, timesteps: int) -> None:
    """Train, be refused, convert with a rule, fine-tune."""
    torch.manual_seed(0)
    digits, card = zoo.load_data("digits"), zoo.card("digits-cnn")
    train = zoo.Batches(digits.train, card.preprocessing, batch_size=64, shuffle_seed=0)
    test = zoo.Batches(digits.test, card.preprocessing)

    ann = Residual()
    optimiser = torch.optim.Adam(ann.parameters(), lr=0.005)
    for epoch in range(epochs):
        for images, labels in train.at_epoch(epoch):
            optimiser.zero_grad()
            nn.functional.cross_entropy(ann(images), labels).backward()
            optimiser.step()
    ann.eval()

    try:
        convert(ann, timesteps, data=train)
    except AuditError as refusal:
        print(f"Refused: {refusal}")

    conversion = convert(ann, timesteps, data=train, rules={Squareplus: as_neuron})
    before = evaluate(conversion.snn, test, ann=ann)
    finetune(conversion.snn, train, test, teacher=ann, schedule=Schedule(epochs=tune, lr=0.02))
    after = evaluate(conversion.snn, test, ann=ann)
    for name, value in (("ANN", before.ann_accuracy), ("SNN, converted", _last(before.snn_accuracy)),
                        ("SNN, fine-tuned", _last(after.snn_accuracy))):  # fmt: skip
        print(f"{name}: {100 * value:.2f} %" if value is not None else f"{name}: unknown")


def _last(values: tuple[float, ...] | None) -> float | None:
    return values[-1] if values else None


if __name__ == "__main__":
    main()
