"""Augmentation: what is drawn decides everything, and a part of the rows gives that part of the images."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lmh import zoo
from lmh.errors import ArgumentError
from lmh.torchvision_shim import torchvision
from lmh.zoo import AutoAugment, Batches, CropFlip, Cutout, DataSet, ForSVHN, InTurn, Roll, Rotate
from lmh.zoo.augmentation import Augmentation, chosen_rows

PAPER = InTurn((CropFlip(4), AutoAugment(), Cutout(16)))
ALL = [CropFlip(2), CropFlip(0), CropFlip(1, flip=False), Cutout(8), AutoAugment(ForSVHN()), Roll(0.5), Rotate(), PAPER]


def images() -> Tensor:
    return torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8)


def drawn(way: Augmentation, seed: int) -> Any:
    return way.draw(12, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("way", ALL, ids=str)
def test_what_was_drawn_decides_and_rows_go_by_themselves(way: Augmentation) -> None:
    x = images()
    before = x.clone()
    whole = way.apply(x, drawn(way, 0))
    assert torch.equal(x, before)
    assert (whole.shape, whole.dtype) == (x.shape, x.dtype)
    torch.rand(5)
    assert torch.equal(whole, way.apply(x, drawn(way, 0)))
    assert not torch.equal(whole, way.apply(x, drawn(way, 1)))
    rows = slice(1, None, 3)
    assert torch.equal(whole[rows], way.apply(x[rows], chosen_rows(drawn(way, 0), rows)))


def test_the_random_state_is_the_callers() -> None:
    x, state = images(), torch.get_rng_state()
    PAPER.apply(x, drawn(PAPER, 0))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_images_of_a_transform_are_each_transformed_as_alone() -> None:
    x, way = images(), AutoAugment()
    for seed in range(20):
        (seeds,) = drawn(way, seed)
        assert 3 <= len(seeds.unique()) <= 8
        alone = [way.apply(image[None], (own[None],)) for image, own in zip(x, seeds, strict=True)]
        assert torch.equal(way.apply(x, (seeds,)), torch.cat(alone))
    (many,) = way.draw(4000, torch.Generator().manual_seed(0))
    counts = many.unique(return_counts=True)[1]
    assert 950 < len(counts) <= 1000
    assert float(counts.double().mean()) < 4.3


def test_roll_moves_each_image_around_its_borders() -> None:
    x = torch.randint(0, 256, (12, 3, 20, 32), dtype=torch.uint8)
    shares = drawn(Roll(0.25), 0)[0]
    for image, moved, share in zip(x, Roll(0.25).apply(x, (shares,)), shares, strict=True):
        down, right = (round(float(part)) for part in share * 0.25 * torch.tensor([20, 32]))
        assert torch.equal(moved, image.roll((down, right), (1, 2)))
    assert len((shares * 5).round().unique()) > 4


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float32])
def test_rotate_turns_each_image_as_torchvision_does(dtype: torch.dtype) -> None:
    x = torch.randint(1, 256, (12, 3, 20, 32)).to(dtype)
    shares = drawn(Rotate(30), 0)[0]
    rotate = torchvision().transforms.v2.functional.rotate
    expected = torch.stack([rotate(image, 30 * float(share)) for image, share in zip(x, shares, strict=True)])
    found = Rotate(30).apply(x, (shares,))
    assert found.dtype == dtype
    assert float((found == expected).double().mean()) > 0.999  # a pixel in the middle between two may be either


def test_cutout_blackens_one_square() -> None:
    x = torch.full((200, 1, 32, 32), 255, dtype=torch.uint8)
    way = Cutout(8)
    black = way.apply(x, way.draw(200, torch.Generator().manual_seed(0))) == 0
    rows, columns = black.any(3).sum(2), black.any(2).sum(2)
    assert torch.equal(black.sum((1, 2, 3)), (rows * columns).flatten())
    assert (int(rows.max()), int(columns.max())) == (8, 8)
    assert int(rows.min()) >= 4
    assert 0.7 < float((rows == 8).double().mean()) < 0.9


@pytest.mark.parametrize("size", [0, 2.5, True])
def test_a_size_that_is_none_is_refused(size: Any) -> None:
    with pytest.raises(ArgumentError, match=r"expected a whole number of pixels, such as 16"):
        Cutout(size)


def test_a_policy_by_name_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"policy is the string 'cifar10'.*Pass ForCIFAR10\(\) or ForImageNet\(\)"):
        AutoAugment("cifar10")  # type: ignore[arg-type]


class TestBatches:
    @pytest.fixture
    def batches(self, digits: DataSet) -> Batches:
        card = zoo.card("digits-cnn")
        way = InTurn((CropFlip(1), Cutout(3)))
        return Batches(digits.train, card.preprocessing, 32, torch.arange(70), augmentation=way, shuffle_seed=3)

    def test_they_begin_in_the_middle_without_reading_the_rest(self, batches: Batches) -> None:
        read: list[int] = []

        class Counted:
            labels = batches.split.labels

            def __len__(self) -> int:
                return len(batches.split)

            def images(self, indices: Tensor) -> Tensor:
                read.append(len(indices))
                return batches.split.images(indices)

        whole = list(batches.at_epoch(2))
        part = list(replace(batches, split=Counted()).at_epoch(2).from_batch(1))
        assert len(part) == 2
        assert read == [32, 6]
        for (x, y), (x2, y2) in zip(whole[1:], part, strict=True):
            assert torch.equal(x, x2)
            assert torch.equal(y, y2)

    def test_processes_share_each_batch(self, batches: Batches) -> None:
        whole, shards = list(batches), [list(batches.shard(rank, 3)) for rank in range(3)]
        for index, (x, y) in enumerate(whole):
            for rank, shard in enumerate(shards):
                assert torch.equal(shard[index][0], x[rank::3])
                assert torch.equal(shard[index][1], y[rank::3])

    def test_a_batch_with_fewer_images_than_processes_is_left_out_everywhere(self, batches: Batches) -> None:
        for rank in range(7):
            shard = batches.shard(rank, 7)
            assert len(list(shard)) == len(shard) == 2
        assert len(batches.shard(0, 6)) == len(list(batches.shard(5, 6))) == 3
