# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import PIL.Image
import pytest
import torch
from sample_images import colour_image
from transformers import BitImageProcessor, ViTImageProcessor

from hf_vitreg.data.collate import collate, mixing
from hf_vitreg.data.transforms import (
    EvalTransform,
    input_size,
    new_image_processor,
    resized_image_processor,
    train_transform,
)
from hf_vitreg.recipe import AugmentationOptions


OFF = {"random_crop_min_scale": 1.0}


def test_eval_is_what_the_saved_processor_does(tmp_path):
    processor = new_image_processor(14)
    processor.save_pretrained(tmp_path)
    image = colour_image(1, 5)
    expected = BitImageProcessor.from_pretrained(tmp_path)(image, return_tensors="pt")["pixel_values"][0]
    assert expected.shape == (3, 14, 14)
    assert torch.equal(EvalTransform(processor)(image), expected)


def test_training_without_randomness_is_eval():
    image = colour_image(2, 3, height=28, width=28)
    processor = new_image_processor(14)
    plain = train_transform(processor, AugmentationOptions(**OFF))(image)
    assert plain.shape == (3, 14, 14) and plain.dtype == torch.float32
    assert (plain - EvalTransform(processor)(image)).abs().max() < 0.05


def test_flip_and_rand_augment_change_the_image():
    image, processor = colour_image(0, 1, height=14, width=14), new_image_processor(14)
    plain = train_transform(processor, AugmentationOptions(**OFF))(image)
    flipped = train_transform(processor, AugmentationOptions(horizontal_flip=1.0, **OFF))(image)
    assert torch.allclose(flipped, plain.flip(-1))
    augmented = train_transform(processor, AugmentationOptions(rand_augment_num_ops=3, **OFF))
    assert any(not torch.allclose(augmented(image), plain) for _ in range(5))


def test_another_size_keeps_the_share_that_the_crop_takes():
    processor = BitImageProcessor(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}, resample=2)
    resized = resized_image_processor(processor, 448)
    assert resized.size["shortest_edge"] == 512
    assert (resized.crop_size["height"], resized.crop_size["width"]) == (448, 448)
    assert resized.resample == PIL.Image.Resampling.BILINEAR


def test_a_processor_that_does_not_crop_is_brought_to_another_size_too():
    square = {"height": 256, "width": 256}
    processor = BitImageProcessor(size=square, crop_size=square, do_center_crop=False)
    assert input_size(processor) == (256, 256)
    resized = resized_image_processor(processor, 112)
    assert input_size(resized) == (112, 112) and not resized.do_center_crop
    assert EvalTransform(resized)(colour_image(0, 1, height=30, width=50)).shape == (3, 112, 112)
    without_crop_size = ViTImageProcessor(size={"height": 224, "width": 224})
    assert input_size(resized_image_processor(without_crop_size, 96)) == (96, 96)


def test_a_processor_for_images_of_any_size_is_refused():
    processor = BitImageProcessor(size={"shortest_edge": 256}, do_center_crop=False)
    with pytest.raises(ValueError, match=r"images of different sizes .*Set do_center_crop"):
        input_size(processor)


def test_collate_stacks():
    batch = collate([{"pixel_values": torch.full((3, 5, 7), index), "labels": index} for index in range(2)])
    assert batch["pixel_values"].shape == (2, 3, 5, 7) and batch["labels"].tolist() == [0, 1]


def test_collate_stacks_whatever_there_is():
    batch = collate([{"global_crops": torch.zeros(2, 3, 5, 5), "local_crops": torch.zeros(0, 3, 4, 4)}] * 3)
    assert batch["global_crops"].shape == (3, 2, 3, 5, 5) and batch["local_crops"].shape == (3, 0, 3, 4, 4)
    assert collate([{"labels": 1}, {"labels": 0}])["labels"].dtype == torch.int64


def test_no_mixing_is_the_identity():
    pixel_values, labels = torch.rand(3, 3, 5, 7), torch.tensor([0, 2, 1])
    mixed, targets = mixing(AugmentationOptions(), num_labels=4)(pixel_values, labels)
    assert mixed is pixel_values and targets is labels


@pytest.mark.parametrize("options", [{"mixup_alpha": 0.8}, {"cutmix_alpha": 1.0}])
def test_mixing_gives_probabilities_that_match_the_pixels(options):
    # each image is constant, so the share of a label shows in the pixels
    pixel_values = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 3, 11, 13).clone()
    mixed, targets = mixing(AugmentationOptions(**options), num_labels=5)(pixel_values, torch.arange(5))
    assert targets.shape == (5, 5)
    assert torch.allclose(targets.sum(dim=1), torch.ones(5))
    assert torch.allclose(mixed.mean(dim=(1, 2, 3)), targets @ torch.arange(5.0), atol=1e-4)
