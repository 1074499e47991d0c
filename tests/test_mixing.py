"""Mixup and CutMix: their formulas, their labels, and training with them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nets
from lmh.errors import ArgumentError
from lmh.finetune import (
    TET,
    CrossEntropy,
    CutMix,
    Distillation,
    Mixup,
    Schedule,
    fit,
)
from lmh.finetune.losses import combined
from lmh.finetune.mixing import MixedLabels, mixed


class TestMixing:
    def test_mixup_is_its_formula(self) -> None:
        x, labels = torch.rand(8, 3, 4, 4), torch.arange(8)
        (out,), soft = mixed((x,), labels, (Mixup(),), 5, 0)
        assert isinstance(soft, MixedLabels)
        assert torch.equal(soft.first, labels)
        assert torch.allclose(out, soft.share * x + (1 - soft.share) * x[soft.second])

    def test_cutmix_has_every_pixel_from_one_of_both_and_counts_them(self) -> None:
        x, labels = torch.rand(8, 3, 8, 8), torch.arange(8)
        for seed in range(20):
            (out,), soft = mixed((x,), labels, (CutMix(),), seed, 0)
            assert isinstance(soft, MixedLabels)
            own = (out == x).all(1)
            partner = (out == x[soft.second]).all(1)
            assert bool((own | partner).all())
            strangers = soft.second != labels
            assert float(own[strangers].double().mean()) == pytest.approx(soft.share)

    def test_shares_are_spread_as_alpha_says(self) -> None:
        def shares(alpha: float) -> Tensor:
            found = []
            for seed in range(400):
                _, soft = mixed((torch.zeros(2, 3),), torch.arange(2), (Mixup(alpha),), seed, 0)
                assert isinstance(soft, MixedLabels)
                found.append(soft.share)
            return torch.tensor(found)

        even, edged = shares(1.0), shares(0.1)
        assert float(even.mean()) == pytest.approx(0.5, abs=0.05)
        assert float(even.var()) == pytest.approx(1 / 12, abs=0.01)
        assert float(edged.var()) == pytest.approx(0.25 / 1.2, abs=0.02)

    @pytest.mark.parametrize("way", [Mixup(), CutMix()])
    def test_several_inputs_are_mixed_alike(self, way: Mixup | CutMix) -> None:
        x = torch.rand(8, 3, 8, 8)
        (a, b), _ = mixed((x, 2 * x), torch.arange(8), (way,), 3, 0)
        assert torch.allclose(b, 2 * a)
        assert not torch.equal(a, x)

    def test_event_frames_are_mixed_along_their_batch(self) -> None:
        x = torch.rand(3, 8, 2, 4, 4)
        (out,), soft = mixed((x,), torch.arange(8), (Mixup(),), 1, 1)
        assert isinstance(soft, MixedLabels)
        assert torch.allclose(out, soft.share * x + (1 - soft.share) * x[:, soft.second])

    @pytest.mark.parametrize("loss", [CrossEntropy(0.1), TET(0.2)])
    def test_mixed_labels_are_soft_targets(self, loss: CrossEntropy | TET) -> None:
        outputs = torch.randn(3, 6, 4) if loss.per_step else torch.randn(6, 4)
        first, second = torch.randint(4, (6,)), torch.randint(4, (6,))
        ours = combined(loss, None, outputs, MixedLabels(first, second, 0.3), None)
        soft = 0.3 * F.one_hot(first, 4).float() + 0.7 * F.one_hot(second, 4).float()
        if isinstance(loss, CrossEntropy):
            assert torch.allclose(ours, F.cross_entropy(outputs, soft, label_smoothing=0.1))
        else:
            each = F.cross_entropy(outputs.flatten(0, 1), soft.repeat(3, 1))
            assert torch.allclose(ours, 0.8 * each + 0.2 * (outputs - 1).square().mean())

    def test_a_teacher_is_shown_the_mixed_images_and_needs_no_labels(self) -> None:
        shown: list[Tensor] = []

        class Teacher(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                shown.append(x)
                return x[:, :3]

        students: list[Tensor] = []
        student = nets.two_layers()
        student.register_forward_pre_hook(lambda _m, inputs: students.append(inputs[0]))
        batches = [x for x, _ in nets.two_layer_batches()]
        fit(student, batches, None, Schedule(epochs=1, mixing=(Mixup(),)), teacher=Teacher())
        assert len(shown) == 4
        assert all(torch.equal(a, b) for a, b in zip(shown, students, strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(shown, batches, strict=True))

    def test_both_ways_are_drawn(self) -> None:
        x = torch.rand(4, 1, 8, 8)
        ways = {bool((mixed((x,), None, (Mixup(), CutMix()), seed, 0)[0][0] == x).any()) for seed in range(20)}
        assert ways == {True, False}

    def test_cutmix_of_what_is_no_image_is_refused(self) -> None:
        with pytest.raises(ArgumentError, match=r"shape \[16, 4\]; expected images.*Use Mixup\(\)"):
            fit(nets.two_layers(), nets.two_layer_batches(), None, Schedule(epochs=1, mixing=(CutMix(),)))

    @pytest.mark.parametrize("mixing", [Mixup(), (Mixup,), ["mixup"], ("mixup",)])
    def test_what_is_no_tuple_of_ways_is_refused(self, mixing: Any) -> None:
        with pytest.raises(ArgumentError, match=r"expected a tuple of ways to mix\. Pass \(Mixup\(\), CutMix\(\)\)"):
            Schedule(epochs=1, mixing=mixing)

    @pytest.mark.parametrize("kind", [Mixup, CutMix])
    @pytest.mark.parametrize("alpha", [0.0, -1.0, math.inf])
    def test_an_alpha_out_of_range_is_refused(self, kind: type, alpha: float) -> None:
        with pytest.raises(ArgumentError, match=r"alpha is .*expected a finite number above 0"):
            kind(alpha)


def test_the_mixing_is_of_the_schedules_seed() -> None:
    networks = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        network = nets.two_layers()
        fit(network, [(torch.ones(4, 4).cumsum(0), torch.tensor([0, 1, 2, 0]))], None,
            Schedule(epochs=2, mixing=(Mixup(),), seed=seed))  # fmt: skip
        networks.append(network)
    assert nets.same(networks[0], networks[1])
    assert not nets.same(networks[0], networks[2])


def test_distillation_weighs_labels_and_teacher_of_mixed_batches() -> None:
    outputs, teacher = torch.randn(6, 4), torch.randn(6, 4)
    labels = MixedLabels(torch.randint(4, (6,)), torch.randint(4, (6,)), 0.25)
    ours = combined(CrossEntropy(), Distillation(0.4), outputs, labels, teacher)
    hard = 0.25 * F.cross_entropy(outputs, labels.first) + 0.75 * F.cross_entropy(outputs, labels.second)
    assert torch.allclose(ours, 0.6 * hard + 0.4 * Distillation(0.4)(outputs, teacher))
