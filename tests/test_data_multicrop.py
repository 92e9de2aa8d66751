# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import json
import pickle
import random

import augmentation_cases as cases
import PIL.Image
import pytest
import torch
from sample_images import colour_image
from scipy.stats import ks_2samp
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from hf_vitreg.data import photometric
from hf_vitreg.data.collate import collate
from hf_vitreg.data.masking import batch_masks
from hf_vitreg.data.multicrop import CropFinish, MultiCropTransform, random_boxes
from hf_vitreg.distributed import derived_seed, forked_rng
from hf_vitreg.pretrain_recipe import PretrainRecipe


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PLAIN = {"color_jitter": 0.0, "grayscale": 0.0, "global_blur": [0.0, 0.0], "local_blur": 0.0, "solarize": 0.0}


def recipe(**options) -> PretrainRecipe:
    return PretrainRecipe(**{"global_crop_size": [28], "local_crop_size": [14], "num_local_crops": 3, **options})


def transform(**options) -> MultiCropTransform:
    return MultiCropTransform(recipe(**options), MEAN, STD)


def original(case: str) -> dict[str, dict]:
    return json.loads(cases.FIXTURE.read_text())[case]


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("dinov2", {"legacy_blur_probability": True}),
        ("dinov2_blur_as_asked", {}),
        (
            "dinov3_gram",
            {"legacy_blur_probability": True, "gram_weight": 1.0, "gram_crop_size": [cases.GRAM_SIZE]},
        ),
    ],
)
def test_crops_are_on_the_average_those_of_the_original_code(case, options):
    sizes = {"global_crop_size": [cases.GLOBAL_SIZE], "local_crop_size": [cases.LOCAL_SIZE]}
    crop = transform(num_local_crops=cases.NUM_LOCAL, **sizes, **options)
    image = cases.photograph()

    def draw() -> dict[str, torch.Tensor]:
        crops = crop(image)
        first, second = crops["global_crops"].split(1)
        gram = {"gram": crops["gram_crops"]} if "gram_crops" in crops else {}
        return {"global_0": first, "global_1": second, **gram, "local": crops["local_crops"]}

    cases.seed()
    cases.assert_alike(cases.summarize(draw, 500, {"mean": MEAN, "std": STD}), original(case))


def test_the_comparison_sees_a_probability_of_blur_that_is_not_inverted():
    with pytest.raises(AssertionError):
        cases.assert_alike(original("dinov2"), original("dinov2_blur_as_asked"))


def test_crops_have_their_sizes():
    crops = transform(gram_weight=1.0, gram_crop_size=[42])(colour_image(0, 1))
    assert {name: tuple(tensor.shape) for name, tensor in crops.items()} == {
        "global_crops": (2, 3, 28, 28),
        "local_crops": (3, 3, 14, 14),
        "gram_crops": (2, 3, 42, 42),
    }
    assert all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in crops.values())


def test_without_anchoring_and_local_crops_there_are_none():
    crops = transform(num_local_crops=0, gram_crop_size=[42])(colour_image(0, 1))
    assert crops["local_crops"].shape == (0, 3, 14, 14) and "gram_crops" not in crops


def test_images_of_a_few_pixels_can_be_cropped():
    crops = transform(global_crop_size=[8], local_crop_size=[4])(colour_image(0, 1, height=5, width=3))
    assert crops["global_crops"].isfinite().all() and crops["local_crops"].shape == (3, 3, 4, 4)


def test_crops_depend_on_torchs_generator_alone():
    image, crop = colour_image(0, 1), pickle.loads(pickle.dumps(transform()))
    found = []
    for state in (1, 2):
        random.seed(state)
        with forked_rng(7):
            found.append(crop(image))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    with forked_rng(8):
        assert not torch.equal(crop(image)["local_crops"], found[0]["local_crops"])


def test_the_crops_of_an_image_are_all_different():
    crops = transform(num_local_crops=8)(colour_image(0, 1))
    for stack in (crops["global_crops"], crops["local_crops"]):
        assert len({tuple(crop.flatten().tolist()) for crop in stack}) == len(stack)


def test_boxes_are_drawn_as_torchvision_draws_them():
    height, width, scale = 61, 97, (0.05, 0.32)
    torch.manual_seed(0)
    ours = torch.tensor(random_boxes(4000, height, width, scale), dtype=torch.float64)
    reference = v2.RandomResizedCrop(8, scale=scale)
    drawn = [reference.make_params([torch.empty(3, height, width)]) for _ in range(4000)]
    theirs = torch.tensor([[box[name] for name in ("top", "left", "height", "width")] for box in drawn]).double()
    for box in (ours, theirs):
        assert (box[:, :2] >= 0).all() and (box[:, 0] + box[:, 2]).max() <= height
        assert (box[:, 1] + box[:, 3]).max() <= width
    for of in (lambda box: box[:, 0], lambda box: box[:, 1], area, lambda box: box[:, 3] / box[:, 2]):
        assert ks_2samp(of(ours), of(theirs)).pvalue > 0.01
    areas = area(ours) / (height * width)
    assert areas.min() > 0.045 and areas.max() < 0.33 and areas.mean() == pytest.approx(0.185, abs=0.005)


def area(boxes: torch.Tensor) -> torch.Tensor:
    return boxes[:, 2] * boxes[:, 3]


@pytest.mark.parametrize(("height", "width"), [(5, 101), (101, 5), (1, 1)])
def test_where_no_box_fits_the_middle_is_taken(height, width):
    [box] = random_boxes(1, height, width, (1.0, 1.0))
    expected = v2.RandomResizedCrop(8, scale=(1.0, 1.0)).make_params([torch.empty(3, height, width)])
    assert box == tuple(expected[name] for name in ("top", "left", "height", "width"))


def test_without_colors_a_crop_is_what_pil_makes_of_the_box(monkeypatch):
    image, box = cases.photograph(), (23, 41, 101, 127)
    monkeypatch.setattr("hf_vitreg.data.multicrop.random_boxes", lambda num, *_: [box] * num)
    for flip in (0.0, 1.0):
        crops = transform(horizontal_flip=flip, **PLAIN)(image)
        top, left, height, width = box
        for name, size in (("global_crops", 28), ("local_crops", 14)):
            part = image.crop((left, top, left + width, top + height))
            expected = part.resize((size, size), PIL.Image.Resampling.BICUBIC)
            expected = F.normalize(F.pil_to_tensor(expected) / 255, MEAN, STD)
            expected = expected.flip(-1) if flip else expected
            # one of 255 levels
            assert (crops[name] - expected).abs().max() < 1.1 / 255 / min(STD)


def test_the_anchor_sees_the_boxes_of_the_student_without_its_colors():
    image = cases.photograph()
    for size in (28, 56):
        found = {}
        for name, options in {"plain": PLAIN, "colored": {"solarize": 1.0}}.items():
            with forked_rng(3):
                found[name] = transform(gram_weight=1.0, gram_crop_size=[size], **options)(image)
        assert torch.equal(found["plain"]["gram_crops"], found["colored"]["gram_crops"])
        assert not torch.allclose(found["colored"]["global_crops"], found["plain"]["global_crops"])
        smaller = F.resize(
            found["plain"]["gram_crops"], [28, 28], interpolation=v2.InterpolationMode.BICUBIC, antialias=True
        )
        assert (smaller - found["plain"]["global_crops"]).abs().max() < 1.1 / 255 / min(STD)


def test_without_a_size_of_its_own_the_anchor_sees_that_of_the_student():
    crops = transform(gram_weight=1.0, **PLAIN)(cases.photograph())
    assert torch.allclose(crops["gram_crops"], crops["global_crops"])


def shares_of_change(monkeypatch, change: str, **options) -> list[float]:
    """How often each of the global crops, and the local ones together, went through a change."""
    monkeypatch.setattr(photometric, change, lambda crops: torch.full_like(crops, 7.0))
    crop, image, num_draws = (
        MultiCropTransform(recipe(**{**PLAIN, **options}), (0.0,) * 3, (1.0,) * 3),
        colour_image(0, 1),
        400,
    )
    torch.manual_seed(0)
    changed = torch.zeros(3)
    for _ in range(num_draws):
        crops = crop(image)
        locals_changed = (crops["local_crops"] == 7).flatten(1).all(dim=1).float().mean()
        changed += torch.cat([(crops["global_crops"] == 7).flatten(1).all(dim=1).float(), locals_changed[None]])
    return (changed / num_draws).tolist()


@pytest.mark.parametrize(
    ("change", "options", "expected"),
    [
        ("random_gaussian_blur", {"global_blur": [1.0, 0.1], "local_blur": 0.5}, [1.0, 0.1, 0.5]),
        (
            "random_gaussian_blur",
            {"global_blur": [1.0, 0.1], "local_blur": 0.3, "legacy_blur_probability": True},
            [0.0, 0.9, 0.7],
        ),
        ("solarize", {"solarize": 0.2}, [0.0, 0.2, 0.0]),
        ("grayscale", {"grayscale": 0.2}, [0.2, 0.2, 0.2]),
    ],
)
def test_changes_are_as_frequent_as_asked(monkeypatch, change, options, expected):
    found = shares_of_change(monkeypatch, change, **options)
    assert found == pytest.approx(expected, abs=0.06)
    assert all(share == wanted for share, wanted in zip(found, expected, strict=True) if wanted in (0.0, 1.0))


def test_jitter_has_the_strengths_of_the_paper_times_a_factor(monkeypatch):
    calls = []
    monkeypatch.setattr(photometric, "color_jitter", lambda crops, *strengths: calls.append(strengths) or crops)
    for factor in (1.0, 0.5):
        transform(color_jitter=1.0, color_jitter_strength=factor)(colour_image(0, 1))
        assert calls[-1] == pytest.approx([factor * strength for strength in (0.4, 0.4, 0.2, 0.1)])


def one_process(options: PretrainRecipe, seed: int, batch_size: int) -> CropFinish:
    return CropFinish(options, 7, seed, process_index=0, num_processes=1, batch_size=batch_size)


def batch_of(crop: MultiCropTransform, num_images: int) -> dict[str, torch.Tensor]:
    return collate([crop(colour_image(0, index)) for index in range(num_images)])


def test_processes_together_have_the_masks_of_one():
    options, batch_size, num_patches = recipe(global_crop_size=[35], local_crop_size=[14]), 12, 25
    crops = torch.zeros(batch_size, 2, 3, 35, 35)
    whole = one_process(options, seed=5, batch_size=batch_size)({"global_crops": crops}, 11)
    assert whole["masks"].shape == (2 * batch_size, num_patches) and whole["masks"].dtype == torch.bool
    assert torch.equal(whole["masks"], batch_masks(derived_seed(5, 11, 1), 2 * batch_size, 5, 5).masks)
    for num_processes in (2, 3):
        share = batch_size // num_processes
        parts = [
            CropFinish(options, 7, 5, process, num_processes, share)({"global_crops": crops[:share]}, 11)
            for process in range(num_processes)
        ]
        by_crop = [part["masks"].view(2, share, num_patches) for part in parts]
        assert torch.equal(torch.cat(by_crop, dim=1).flatten(0, 1), whole["masks"])
        weights = sum(part["mask_weights"].sum() for part in parts)
        torch.testing.assert_close(weights, whole["mask_weights"].sum())


def test_indices_and_weights_are_of_the_masks_and_change_with_the_batch():
    finish, crops = one_process(recipe(), seed=5, batch_size=8), torch.zeros(8, 2, 3, 28, 28)
    first, again, next_batch = (finish({"global_crops": crops}, number) for number in (3, 3, 4))
    assert torch.equal(first["masks"].flatten().nonzero()[:, 0], first["mask_indices"])
    assert len(first["mask_weights"]) == len(first["mask_indices"]) and first["mask_weights"].sum() == pytest.approx(8)
    assert (first["masks"].any(dim=1)).sum() == 8
    assert torch.equal(first["masks"], again["masks"]) and not torch.equal(first["masks"], next_batch["masks"])


@pytest.mark.parametrize("options", [{"ibot_weight": 0.0}, {"mask_probability": 0.0}])
def test_where_nothing_is_masked_there_are_no_masks(options):
    batch = {"global_crops": torch.zeros(2, 2, 3, 28, 28)}
    assert one_process(recipe(**options), seed=0, batch_size=2)(batch, 0).keys() == batch.keys()


def test_one_size_stays_as_it_is():
    batch = batch_of(transform(), 2)
    finished = one_process(recipe(), seed=0, batch_size=2)(batch, 0)
    assert all(finished[name] is batch[name] for name in batch)


def test_sizes_are_drawn_together_and_alike_on_all_processes():
    options = recipe(
        global_crop_size=[14, 28, 21],
        local_crop_size=[7, 14, 14],
        gram_weight=1.0,
        gram_crop_size=[28, 35, 42],
    )
    batch = batch_of(MultiCropTransform(options, MEAN, STD), 2)
    assert [batch[name].shape[-1] for name in ("global_crops", "local_crops", "gram_crops")] == [28, 14, 42]
    found = set()
    for number in range(20):
        finished = [CropFinish(options, 7, 1, process, 2, 2)(batch, number) for process in range(2)]
        sizes = [
            tuple(part[name].shape[-1] for name in ("global_crops", "local_crops", "gram_crops")) for part in finished
        ]
        assert sizes[0] == sizes[1]
        assert finished[0]["masks"].shape == (4, (sizes[0][0] // 7) ** 2)
        found.add(sizes[0])
    assert found == {(14, 7, 28), (28, 14, 35), (21, 14, 42)}


def test_smaller_sizes_are_resized_with_antialiasing():
    options = recipe(global_crop_size=[14, 28], local_crop_size=[14, 14], num_local_crops=0)
    batch = batch_of(MultiCropTransform(options, MEAN, STD), 2)
    finish = one_process(options, seed=0, batch_size=2)
    drawn = [finish(batch, number)["global_crops"] for number in range(8)]
    small = next(crops for crops in drawn if crops.shape[-1] == 14)
    bicubic = {"mode": "bicubic", "antialias": True}
    expected = torch.nn.functional.interpolate(batch["global_crops"].flatten(0, 1), size=(14, 14), **bicubic)
    torch.testing.assert_close(small.flatten(0, 1), expected)


def test_crops_of_half_a_patch_are_refused():
    for name in ("global", "local", "gram"):
        options = recipe(gram_weight=1.0, **{f"{name}_crop_size": [30]})
        with pytest.raises(
            ValueError, match=rf"--{name}_crop_size must be multiples of the patch size, 7, got \[30\]"
        ):
            one_process(options, seed=0, batch_size=2)
