"""A torchvision ResNet-18, trained from scratch on handwritten digits, then converted and fine-tuned.

    python examples/resnet_on_digits.py
    python examples/resnet_on_digits.py --epochs 15 --timesteps 8

Prints the accuracy of the network, of its spiking copy after each step, and of that copy after training, and writes
resnet-on-digits.html with the figures.
"""

from __future__ import annotations

import click
import torch
from torch import nn

from lmh import evaluate, zoo
from lmh.convert import convert
from lmh.convert.reporting import report_on
from lmh.finetune import Schedule, finetune
from lmh.report import write_report
from lmh.torchvision_shim import torchvision

DIGITS = zoo.Preprocessing((1, 8, 8), mean=(0.3,), std=(0.4,))


def resnet_for_digits() -> nn.Module:
    """ResNet-18 of torchvision with a first layer for one channel of 8×8 pixels, and without its first pool."""
    network = torchvision().models.resnet18(num_classes=10)
    network.conv1 = nn.Conv2d(1, 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return network


def train(network: nn.Module, batches: zoo.Batches, epochs: int) -> None:
    """Plain PyTorch: SGD on the cross-entropy, the learning rate falling to 0."""
    optimiser = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * len(batches))
    network.train()
    for epoch in range(epochs):
        for images, labels in batches.at_epoch(epoch):
            optimiser.zero_grad()
            nn.functional.cross_entropy(network(images), labels).backward()
            optimiser.step()
            scheduler.step()
    network.eval()


def percent(values: tuple[float, ...] | None) -> str:
    """Return accuracies as text."""
    return ", ".join(f"{100 * value:.2f}" for value in values or ())


@click.command()
@click.option("--epochs", default=8, show_default=True, help="Of the network.")
@click.option("--tune", default=2, show_default=True, help="Epochs of the spiking network.")
@click.option("--timesteps", default=4, show_default=True)
@click.option("--train-samples", type=int, help="Training images to take; all unless given.")
def main(epochs: int, tune: int, timesteps: int, train_samples: int | None) -> None:
    """Train, convert, fine-tune, and say what came of it."""
    torch.manual_seed(0)
    digits = zoo.load_data("digits")
    order = zoo.seeded_order(digits.train, 0)[:train_samples]
    batches = zoo.Batches(digits.train, DIGITS, batch_size=64, indices=order, shuffle_seed=0)
    test = zoo.Batches(digits.test, DIGITS)

    ann = resnet_for_digits()
    train(ann, batches, epochs)

    conversion = convert(ann, timesteps, data=batches)
    before = evaluate(conversion.snn, test, ann=ann)
    print(f"ANN: {100 * (before.ann_accuracy or 0):.2f} %")
    print(f"SNN, converted, t = 1…{timesteps}: {percent(before.snn_accuracy)} %")

    tuned = finetune(conversion.snn, batches, test, teacher=ann, schedule=Schedule(epochs=tune, lr=0.01))
    after = evaluate(conversion.snn, test, ann=ann)
    print(f"SNN, fine-tuned, t = 1…{timesteps}: {percent(after.snn_accuracy)} %")
    report = report_on(conversion, test, ann=ann, classes=digits.classes, training=tuned.stages)
    page, _ = write_report(report, "resnet-on-digits.html")
    print(f"Written: {page}")


if __name__ == "__main__":
    main()
