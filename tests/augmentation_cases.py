# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""What many random crops of a photograph have in common, and how that is with the original augmentations.

`python tests/augmentation_cases.py DINOV2 DINOV3 DEIT`, with folders of the three repositories at the commits that
loss_cases.py names, writes fixtures/augmentations.json. Their packages ask for what crops do not need; only the files
of augmentation are imported. DeiT imports a private name of timm that is gone.
"""

import importlib
import json
import random
import sys
import types
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import PIL.Image
import torch
from sklearn.datasets import load_sample_image


FIXTURE = Path(__file__).parent / "fixtures" / "augmentations.json"
GLOBAL_SIZE, LOCAL_SIZE, GRAM_SIZE, NUM_LOCAL = 48, 24, 80, 2
IMAGE_SIZE = 48
NUM_DRAWS = 3000
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def photograph() -> PIL.Image.Image:
    """A temple, 317 x 211 pixels."""
    return PIL.Image.fromarray(load_sample_image("china.jpg")).resize((317, 211), PIL.Image.Resampling.BICUBIC)


def describe(crops: torch.Tensor, mean: tuple, std: tuple) -> torch.Tensor:
    """Lightness, contrast, color, sharpness and sidedness of normalized crops `(num_crops, 3, size, size)`."""
    crops = crops * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    luma = crops.mean(dim=1)
    half = crops.shape[-1] // 2
    features = {
        "lightness": luma.mean(dim=(1, 2)),
        "contrast": luma.std(dim=(1, 2)),
        "color": (crops.amax(dim=1) - crops.amin(dim=1)).mean(dim=(1, 2)),
        "red": (crops[:, 0] - luma).mean(dim=(1, 2)),
        "sharpness": (luma.diff(dim=-1).abs().mean(dim=(1, 2)) + 0.001).log(),
        "sidedness": luma[..., :half].mean(dim=(1, 2)) - luma[..., half:].mean(dim=(1, 2)),
    }
    return torch.stack(list(features.values()), dim=1)


def summarize(draw: Callable[[], dict[str, torch.Tensor]], num_draws: int, normalization: dict) -> dict[str, dict]:
    """Means and standard deviations of the description over many draws, for each kind of crop.

    Args:
        draw: Gives crops `(num_crops, 3, size, size)` by kind.
        num_draws: How often.
        normalization: Mean and standard deviation that crops were normalized with.
    """
    found = {}
    for _ in range(num_draws):
        for kind, crops in draw().items():
            found.setdefault(kind, []).append(describe(crops, **normalization))
    return {
        kind: {"mean": values.mean(dim=0).tolist(), "std": values.std(dim=0).tolist(), "num": len(values)}
        for kind, values in ((kind, torch.cat(values).double()) for kind, values in found.items())
    }


def assert_alike(ours: dict[str, dict], original: dict[str, dict]) -> None:
    """Means within four standard errors of each other, standard deviations within a quarter."""
    assert ours.keys() == original.keys()
    for kind in original:
        means, stds = (torch.tensor([source[kind][name] for source in (ours, original)]) for name in ("mean", "std"))
        errors = (stds[0] ** 2 / ours[kind]["num"] + stds[1] ** 2 / original[kind]["num"]).sqrt()
        # what remains of 8-bit arithmetic
        assert ((means[0] - means[1]).abs() <= 4 * errors + 0.004).all(), (kind, means, errors)
        assert ((stds[0] / stds[1]).log().abs() <= 0.22).all(), (kind, stds)


def seed() -> None:
    random.seed(0)
    torch.manual_seed(0)


def without_package(name: str, folder: str) -> types.ModuleType:
    """The module of augmentations of dinov2 or dinov3, without what their packages import."""
    for package in (name, f"{name}.data"):
        module = types.ModuleType(package)
        module.__path__ = [str(Path(folder, *package.split(".")))]
        sys.modules[package] = module
    return importlib.import_module(f"{name}.data.augmentations")


def dino(module: types.ModuleType, blur_as_asked: bool = False, **options) -> dict[str, dict]:
    """Original crops, with their inverted probability of blur or with the one that their configuration asks for."""
    blur = module.GaussianBlur
    chosen = (lambda *, p: blur(p=1 - p)) if blur_as_asked else blur
    with mock.patch.object(module, "GaussianBlur", chosen):
        transform = module.DataAugmentationDINO(
            (0.32, 1.0), (0.05, 0.32), NUM_LOCAL, GLOBAL_SIZE, LOCAL_SIZE, **options
        )
    image = photograph()

    def draw() -> dict[str, torch.Tensor]:
        crops = transform(image)
        found = {f"global_{i}": crop[None] for i, crop in enumerate(crops["global_crops"])}
        if "gram_teacher_crops" in crops:
            found["gram"] = torch.stack(crops["gram_teacher_crops"])
        return found | {"local": torch.stack(crops["local_crops"])}

    seed()
    return summarize(draw, NUM_DRAWS, IMAGENET)


def deit(folder: str, simple_random_crop: bool) -> dict[str, dict]:
    import timm.data.transforms

    timm.data.transforms._pil_interp = None
    sys.path.insert(0, folder)
    augment = importlib.import_module("augment")
    arguments = types.SimpleNamespace(input_size=IMAGE_SIZE, src=simple_random_crop, color_jitter=0.3)
    transform, image = augment.new_data_aug_generator(arguments), photograph()
    seed()
    return summarize(lambda: {"image": transform(image)[None]}, NUM_DRAWS, IMAGENET)


def main(dinov2: str, dinov3: str, deit3: str) -> None:
    first, third = without_package("dinov2", dinov2), without_package("dinov3", dinov3)
    gram = {"gram_teacher_crops_size": GRAM_SIZE, "gram_teacher_no_distortions": True}
    found = {
        "dinov2": dino(first),
        "dinov2_blur_as_asked": dino(first, blur_as_asked=True),
        "dinov3_gram": dino(third, **gram),
        "deit3_random_resized_crop": deit(deit3, simple_random_crop=False),
        "deit3_simple_random_crop": deit(deit3, simple_random_crop=True),
    }
    FIXTURE.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
