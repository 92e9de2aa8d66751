# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Small image datasets that tests make for themselves."""

from pathlib import Path

import datasets
import numpy as np
import PIL.Image


def colour_image(label: int, index: int, height: int = 23, width: int = 37) -> PIL.Image.Image:
    """A noisy image whose class is its colour, different for every index."""
    generator = np.random.default_rng((label, index))
    pixels = generator.integers(0, 60, size=(height, width, 3))
    pixels[..., label % 3] += 150
    return PIL.Image.fromarray(pixels.astype("uint8"))


def write_folder(folder: Path, counts: dict[str, int], suffix: str = ".png") -> Path:
    """`folder/class_name/000.png` with as many images a class as `counts` says."""
    for label, (name, count) in enumerate(sorted(counts.items())):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            colour_image(label, index).save(folder / name / f"{index:03d}{suffix}")
    return folder


def write_parquet(path: Path, labels: list, label_feature, image_column="image", label_column="label") -> Path:
    """A parquet file of images with these labels."""
    names = sorted(set(labels))
    features = datasets.Features({image_column: datasets.Image(), label_column: label_feature})
    images = [colour_image(names.index(label), index) for index, label in enumerate(labels)]
    datasets.Dataset.from_dict({image_column: images, label_column: labels}, features=features).to_parquet(str(path))
    return path
