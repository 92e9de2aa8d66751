# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import json
import pickle
import random

import augmentation_cases as cases
import pytest
import torch
from sample_images import colour_image
from torchvision.transforms.v2 import functional as F

from hf_vitreg.data import photometric
from hf_vitreg.data.augmentations import PixelValues
from hf_vitreg.data.deit3 import ThreeAugment, label_mixing, supervised_transform
from hf_vitreg.distributed import forked_rng
from hf_vitreg.objective_options import SupervisedOptions


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PLAIN = {"three_augment": False, "flip": 0.0}


def transform(image_size: int, **options) -> PixelValues:
    return supervised_transform(SupervisedOptions(**options), image_size, MEAN, STD)


@pytest.mark.parametrize("train_crop", ["random_resized_crop", "simple_random_crop"])
def test_images_are_on_the_average_those_of_the_original_code(train_crop):
    augment, image = transform(cases.IMAGE_SIZE, train_crop=train_crop), cases.photograph()
    cases.seed()
    found = cases.summarize(lambda: {"image": augment(image)["pixel_values"][None]}, 500, {"mean": MEAN, "std": STD})
    cases.assert_alike(found, json.loads(cases.FIXTURE.read_text())[f"deit3_{train_crop}"])


def test_images_depend_on_torchs_generator_alone():
    augment, image, found = pickle.loads(pickle.dumps(transform(13))), colour_image(0, 1), []
    for state in (1, 2):
        random.seed(state)
        with forked_rng(7):
            found.append(augment(image)["pixel_values"])
    assert torch.equal(*found) and found[0].shape == (3, 13, 13) and found[0].dtype == torch.float32
    with forked_rng(8):
        assert not torch.equal(augment(image)["pixel_values"], found[0])


def test_one_of_three_changes_is_drawn_with_equal_probability(monkeypatch):
    counts = dict.fromkeys(("grayscale", "solarize", "random_gaussian_blur"), 0)
    for name in counts:

        def count(crops: torch.Tensor, name: str = name) -> torch.Tensor:
            counts[name] += 1
            return crops

        monkeypatch.setattr(photometric, name, count)
    torch.manual_seed(0)
    for _ in range(600):
        ThreeAugment(0.3)(torch.zeros(3, 5, 7, dtype=torch.uint8))
    assert sum(counts.values()) == 600 and all(160 < number < 240 for number in counts.values())


def test_jitter_follows_with_its_strength(monkeypatch):
    calls = []
    monkeypatch.setattr(photometric, "color_jitter", lambda crops, *strengths: calls.append(strengths) or crops)
    transform(13, three_augment_color_jitter=0.2)(colour_image(0, 1))
    assert calls == [(0.2, 0.2, 0.2)]


def test_a_simple_random_crop_is_the_image_moved_by_four_pixels_at_the_most():
    image = colour_image(0, 1, height=19, width=19)
    padded = F.pad(F.normalize(F.pil_to_tensor(image) / 255, MEAN, STD), 4, padding_mode="reflect")
    windows = padded.unfold(1, 19, 1).unfold(2, 19, 1).movedim(0, 2)
    torch.manual_seed(0)
    places = set()
    for _ in range(300):
        crop = transform(19, train_crop="simple_random_crop", **PLAIN)(image)["pixel_values"]
        [place] = (windows - crop).abs().amax(dim=(2, 3, 4)).less(1e-5).nonzero().tolist()
        places.add(tuple(place))
    assert {row for row, _ in places} == {col for _, col in places} == set(range(9))


def test_an_image_that_is_not_square_keeps_its_proportions_in_a_simple_random_crop():
    image = colour_image(0, 1, height=20, width=40)
    assert transform(10, train_crop="simple_random_crop")(image)["pixel_values"].shape == (3, 10, 10)


def test_rand_augment_takes_the_place_of_three_augment(monkeypatch):
    image = colour_image(0, 1, height=13, width=13)
    whole = {"random_crop_min_scale": 1.0, "flip": 0.0}
    plain = transform(13, three_augment=False, **whole)(image)["pixel_values"]
    assert torch.allclose(plain, F.normalize(F.pil_to_tensor(image) / 255, MEAN, STD), atol=1e-5)
    monkeypatch.setattr(photometric, "color_jitter", None)
    augment = transform(13, rand_augment_num_ops=3, **whole)
    assert any(not torch.allclose(augment(image)["pixel_values"], plain) for _ in range(5))


def test_flips_are_as_frequent_as_asked():
    image = colour_image(0, 1, height=13, width=13)
    plain = transform(13, random_crop_min_scale=1.0, three_augment=False, flip=0.0)(image)["pixel_values"]
    torch.manual_seed(0)
    for flip, low, high in ((0.0, 0, 0), (0.5, 70, 130), (1.0, 200, 200)):
        augment = transform(13, random_crop_min_scale=1.0, three_augment=False, flip=flip)
        flipped = sum(torch.equal(augment(image)["pixel_values"], plain.flip(-1)) for _ in range(200))
        assert low <= flipped <= high


def batch() -> dict[str, torch.Tensor]:
    # each image is constant, so the share of a label shows in the pixels
    return {
        "pixel_values": torch.arange(5.0).view(5, 1, 1, 1).expand(5, 3, 11, 13).clone(),
        "labels": torch.tensor([0, 1, 2, 3, 4]),
    }


def test_mixing_is_a_function_of_seed_batch_and_process():
    def mixed(seed: int, number: int, process_index: int) -> torch.Tensor:
        return label_mixing(SupervisedOptions(), 7, seed, process_index)(batch(), number)["labels"]

    state = torch.get_rng_state()
    first = mixed(1, 2, 3)
    assert torch.equal(torch.get_rng_state(), state) and first.shape == (5, 7)
    torch.manual_seed(9)
    assert torch.equal(mixed(1, 2, 3), first)
    assert not any(torch.equal(mixed(*other), first) for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4)))


@pytest.mark.parametrize("options", [{"cutmix_alpha": 0.0}, {"mixup_alpha": 0.0}, {}])
def test_labels_say_what_is_in_the_pixels(options):
    finish = label_mixing(SupervisedOptions(**options), 5, seed=0)
    for number in range(10):
        found = finish(batch(), number)
        assert torch.allclose(found["labels"].sum(dim=1), torch.ones(5))
        assert torch.allclose(
            found["pixel_values"].mean(dim=(1, 2, 3)), found["labels"] @ torch.arange(5.0), atol=1e-4
        )


def test_both_kinds_of_mixing_are_drawn():
    finish = label_mixing(SupervisedOptions(), 5, seed=0)
    kinds = {len(finish(batch(), number)["pixel_values"][1].unique()) > 1 for number in range(20)}
    assert kinds == {True, False}  # cutmix leaves two values in an image, mixup one


def test_without_mixing_a_batch_stays():
    given = batch()
    found = label_mixing(SupervisedOptions(mixup_alpha=0.0, cutmix_alpha=0.0), 5, seed=0)(given, 0)
    assert all(found[name] is given[name] for name in given)
