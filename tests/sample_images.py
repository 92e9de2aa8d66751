# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Small image datasets that tests make for themselves."""

import io
import json
import tarfile
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


def png(label: int, index: int) -> bytes:
    """A colour image, encoded."""
    buffer = io.BytesIO()
    colour_image(label, index).save(buffer, format="PNG")
    return buffer.getvalue()


def write_tar(path: Path, examples: dict[str, dict[str, bytes]]) -> Path:
    """A WebDataset shard: of each example, by its key, the content of its members by their suffix."""
    with tarfile.open(path, "w") as archive:
        for key, members in examples.items():
            for suffix, content in members.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def write_shards(folder: Path, num_examples=(4, 3)) -> str:
    """Tars with every kind of member, whose pattern it returns; class and number of an image are in its key."""
    folder.mkdir()
    for shard, count in enumerate(num_examples):
        members = {
            f"{shard}{index}": {
                "png": png(shard, index),
                "txt": f"text {shard} {index}".encode(),
                "cls": str(shard).encode(),
                "json": json.dumps({"caption": f"caption {shard} {index}", "height": 23}).encode(),
            }
            for index in range(count)
        }
        write_tar(folder / f"{shard}.tar", members)
    return str(folder / "*.tar")


def write_rows(path: Path, **columns: list) -> str:
    """A parquet file of two images with these columns beside them, whose path it returns."""
    table = datasets.Dataset.from_dict({"image": [colour_image(0, 0)] * 2, **columns})
    table.cast_column("image", datasets.Image()).to_parquet(str(path))
    return str(path)
